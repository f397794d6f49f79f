"""Models of language, and the encoders of text, images and speech that are named like them."""

from __future__ import annotations

from .table import Counts, Family, Row, named, stacked

_LAYERS = r"layers\.(?P<block>\d+)\."
_ONCE: Counts = {"qkv": 1, "proj": 1, "mlp": 2}
_TWICE: Counts = {"qkv": 2, "proj": 2, "mlp": 2}  # a decoder that looks at an encoder
_MANY: Counts = {"qkv": None, "proj": None, "mlp": None}

_HEAD = r"(?:lm_head|score|classifier|embed_out|output|head)\.(?:.+\.)?weight"
_EMBED = (
    r"(?:embed_tokens|embed_positions|embed_in|wte|wpe|word_embeddings|shared|tok_embeddings"
    r"|tokens_embed|positions_embed)\.weight"
)
_BERT_AUX = (
    r"embeddings\..+",
    r"embeddings_project\.weight",
    r"pooler\.(?:.+\.)?weight",
    r"(?:cls|lm_head|generator_predictions|discriminator_predictions|qa_outputs|classifier"
    r"|pre_classifier|vocab_transform|vocab_projector)\..+",
    r"encoder\.rel_embeddings\.weight",
)
_CLIP_AUX = (
    r"embeddings\..+",
    r"(?:visual|text)_projection\.weight",
    r"head\..+",
    r"conv[12]\.weight",
    _EMBED,
    _HEAD,
    r"(?:project_in|project_out)\.weight",
)
_EXPERTS = r"(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\."
_ROUTERS = (
    r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.(?:.+\.)?weight",
    r"mlp\.shared_expert_gate\.weight",
    r"mlp\.experts\.(?:gate_up|down)_proj_bias",
    r"mlp\.(?:gate|moe_statics)\.(?:moe_statics\.)?e_score_correction_bias",
)


def _gated(mlp: str) -> tuple[Row, ...]:
    return (
        named("mlp", f"{mlp}.gate_up_proj"),
        named("mlp", f"{mlp}.gate_proj", f"{mlp}.up_proj", name="gate_up_proj", optional=(0,)),
        named("mlp", f"{mlp}.down_proj"),
    )


def _attention(name: str, out: str = "out_proj") -> tuple[Row, ...]:
    return (
        named("qkv", f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"),
        named("proj", f"{name}.{out}"),
    )


_FC = (named("mlp", "fc1"), named("mlp", "fc2"))
_MLP_FC = (named("mlp", "mlp.fc1"), named("mlp", "mlp.fc2"))
_MLP_H = (named("mlp", "mlp.dense_h_to_4h"), named("mlp", "mlp.dense_4h_to_h"))
_MLP_C = (named("mlp", "mlp.c_fc"), named("mlp", "mlp.c_proj"))
_MLP_FC_IN = (named("mlp", "mlp.fc_in"), named("mlp", "mlp.fc_out"))


def _bert(name: str) -> tuple[Row, ...]:
    return (
        named("qkv", *(f"{name}.self.{x}" for x in ("query", "key", "value"))),
        named("proj", f"{name}.output.dense"),
    )


_LLAMA = (
    named("qkv", "self_attn.qkv_proj"),
    named("qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", optional=(1, 2)),
    *(
        named("qkv", f"self_attn.{name}")  # latent attention
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    ),
    Row("qkv", (r"self_attn\.(?:gate_proj|output_gate)\.weight",)),
    Row("proj", (r"self_attn\.(?:o_proj|dense)\.weight",)),
    *_attention("encoder_attn", "o_proj"),
    *_attention("cross_attn", "o_proj"),
    *_MLP_FC,
    *_gated("mlp"),
    # a tensor of all experts in memory, a tensor for each on disk
    stacked("mlp", "mlp.experts.gate_up_proj"),
    Row(
        "mlp",
        tuple(rf"{_EXPERTS}{name}\.weight" for name in ("(?:gate_proj|w1)", "(?:up_proj|w3)")),
        name="gate_up_proj",
    ),
    stacked("mlp", "mlp.experts.down_proj"),
    Row("mlp", (rf"{_EXPERTS}(?:down_proj|w2)\.weight",)),
    *_gated("mlp.shared_expert"),
    *_gated("mlp.shared_experts"),
)
_LLAMA_AUX = (
    *_ROUTERS,
    r"per_layer_(?:input_gate|projection)\.weight",
    r"(?:altup|laurel)\..+",
    r"self_attn\.indexer\..+",
)

FAMILIES = (
    Family(
        name="llama",
        models="Llama, Qwen2, Qwen3, Qwen-MoE, Mistral, Mixtral, Gemma, Phi, Phi-3, DeepSeek, gpt-oss, "
        "Granite, OLMo, SmolLM, StableLM and others of their names",
        network="llama",
        block=_LAYERS,
        rows=_LLAMA,
        block_aux=_LLAMA_AUX,
        aux=(_EMBED, _HEAD),
        per_block=(_MANY,),
        language=True,
    ),
    Family(
        name="llama_hybrid",
        models="Qwen3-Next, Qwen3.5, MiniMax and others whose blocks have linear attention in turn",
        network="llama",
        block=_LAYERS,
        mark=r"linear_attn\..+",
        rows=_LLAMA,
        block_aux=(*_LLAMA_AUX, r"linear_attn\..+"),
        aux=(_EMBED, _HEAD),
        per_block=(_MANY, {"qkv": 0, "proj": 0, "mlp": None}),
        language=True,
    ),
    Family(
        name="llama_original",
        models="Llama and Mistral as their makers store them",
        network="llama",
        block=_LAYERS,
        rows=(
            named("qkv", "attention.wq", "attention.wk", "attention.wv"),
            named("proj", "attention.wo"),
            named("mlp", "feed_forward.w1", "feed_forward.w3", name="w13"),
            named("mlp", "feed_forward.w2"),
        ),
        aux=(_EMBED, _HEAD),
        language=True,
    ),
    Family(
        name="gpt2",
        models="GPT-2, GPT-BigCode",
        block=r"h\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "attn.c_attn"),
            named("proj", "attn.c_proj"),
            named("qkv", "crossattention.q_attn"),
            named("qkv", "crossattention.c_attn"),
            named("proj", "crossattention.c_proj"),
            *_MLP_C,
        ),
        block_aux=(r"(?:attn|crossattention)\.(?:masked_)?bias",),
        aux=(_EMBED, _HEAD),
        per_block=(_ONCE, {"qkv": 3, "proj": 2, "mlp": 2}),
        language=True,
    ),
    Family(
        name="gpt_neox",
        models="GPT-NeoX, Pythia",
        block=_LAYERS,
        rows=(named("qkv", "attention.query_key_value"), named("proj", "attention.dense"), *_MLP_H),
        block_aux=(r"attention\.(?:masked_)?bias",),
        aux=(_EMBED, _HEAD),
        language=True,
    ),
    Family(
        name="bloom",
        models="BLOOM, Falcon",
        block=r"h\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "self_attention.query_key_value"),
            named("proj", "self_attention.dense"),
            *_MLP_H,
        ),
        aux=(_EMBED, _HEAD),
        language=True,
    ),
    Family(
        name="gptj",
        models="GPT-J, GPT-Neo, CodeGen",
        block=r"h\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "attn.qkv_proj"),
            *_attention("attn"),
            *_attention("attn.attention"),
            *_MLP_FC_IN,
            named("mlp", "mlp.c_fc"),
            named("mlp", "mlp.c_proj"),
        ),
        block_aux=(r"attn\.(?:attention\.)?(?:masked_|causal_)?(?:bias|mask)",),
        aux=(_EMBED, _HEAD),
        language=True,
    ),
    Family(
        name="mpt",
        models="MPT",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "attn.Wqkv"),
            named("proj", "attn.out_proj"),
            named("mlp", "ffn.up_proj"),
            named("mlp", "ffn.down_proj"),
        ),
        aux=(_EMBED, _HEAD),
        language=True,
    ),
    Family(
        name="clip",
        models="CLIP, SigLIP, Whisper, OPT, BART, MBart, Pegasus and others of their names",
        block=_LAYERS,
        rows=(*_attention("self_attn"), *_attention("encoder_attn"), *_MLP_FC, *_FC),
        aux=_CLIP_AUX,
        per_block=(_ONCE, _TWICE),
        language=True,
    ),
    Family(
        name="open_clip",
        models="CLIP of OpenAI and open_clip",
        block=r"resblocks\.(?P<block>\d+)\.",
        rows=(
            Row("qkv", (r"attn\.in_proj_weight",)),
            named("proj", "attn.out_proj"),
            *_MLP_C,
        ),
        aux=(r".*(?:positional|class|token)_embedding(?:\.weight)?", r"(?:proj|text_projection)"),
    ),
    Family(
        name="whisper_original",
        models="Whisper of OpenAI",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(
            *(
                row
                for name in ("attn", "cross_attn")
                for row in (
                    named("qkv", *(f"{name}.{x}" for x in ("query", "key", "value"))),
                    named("proj", f"{name}.out"),
                )
            ),
            named("mlp", "mlp.0"),
            named("mlp", "mlp.2"),
        ),
        aux=(r"(?:conv[12]|token_embedding)\.weight", r"positional_embedding"),
        per_block=(_ONCE, _TWICE),
    ),
    Family(
        name="bert",
        models="BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DeBERTa, BLIP's text and others of their names",
        block=r"layer\.(?P<block>\d+)\.",
        rows=(
            *_bert("attention"),
            named("qkv", *(f"attention.self.{x}_proj" for x in ("query", "key", "value"))),
            *_bert("crossattention"),
            named("mlp", "intermediate.dense"),
            named("mlp", "output.dense"),
        ),
        block_aux=(
            r"attention\.self\.(?:pos_key_proj|pos_query_proj|pos_proj|pos_q_proj)\.weight",
            r"(?:cross)?attention\.self\.distance_embedding\.weight",
        ),
        aux=_BERT_AUX,
        per_block=(_ONCE, _TWICE),
        language=True,
    ),
    Family(
        name="distilbert",
        models="DistilBERT",
        block=r"layer\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "attention.q_lin", "attention.k_lin", "attention.v_lin"),
            named("proj", "attention.out_lin"),
            named("mlp", "ffn.lin1"),
            named("mlp", "ffn.lin2"),
        ),
        aux=_BERT_AUX,
        language=True,
    ),
    Family(
        name="albert",
        models="ALBERT",
        block=r"albert_layer_groups\.(?P<stage>\d+)\.albert_layers\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "attention.query", "attention.key", "attention.value"),
            named("proj", "attention.dense"),
            named("mlp", "ffn"),
            named("mlp", "ffn_output"),
        ),
        aux=(*_BERT_AUX, r"encoder\.embedding_hidden_mapping_in\.weight", r"predictions\..+"),
        language=True,
    ),
    Family(
        name="modernbert",
        models="ModernBERT",
        block=_LAYERS,
        rows=(
            named("qkv", "attn.Wqkv"),
            named("proj", "attn.Wo"),
            named("mlp", "mlp.Wi"),
            named("mlp", "mlp.Wo"),
        ),
        aux=(*_BERT_AUX, r"(?:head|decoder)\..+"),
        language=True,
    ),
    Family(
        name="t5",
        models="T5, mT5, UMT5, LongT5, Flan-T5",
        block=r"block\.(?P<block>\d+)\.layer\.\d+\.",
        rows=(
            *(
                row
                for name in (r"(?:SelfAttention|LocalSelfAttention)", "EncDecAttention")
                for row in (
                    Row("qkv", tuple(rf"{name}\.{x}\.weight" for x in "qkv")),
                    Row("proj", (rf"{name}\.o\.weight",)),
                )
            ),
            named("mlp", "DenseReluDense.wi"),
            named("mlp", "DenseReluDense.wi_0", "DenseReluDense.wi_1", name="wi"),
            named("mlp", "DenseReluDense.wo"),
        ),
        block_aux=(
            r"(?:Local|EncDec)?(?:Self)?Attention\.(?:global_)?relative_attention_bias\.weight",
        ),
        aux=(_EMBED, _HEAD),
        per_block=(_ONCE, _TWICE),
        language=True,
    ),
    Family(
        name="wav2vec2",
        models="wav2vec 2.0, HuBERT, WavLM, data2vec-audio",
        block=_LAYERS,
        rows=(
            *_attention("attention"),
            named("mlp", "feed_forward.intermediate_dense"),
            named("mlp", "feed_forward.output_dense"),
        ),
        block_aux=(r"attention\.(?:gru_)?rel_(?:attn_embed|pos_linear)\.weight",),
        aux=(r"feature_extractor\..+", r"feature_projection\..+", r"encoder\.pos_conv_embed\..+"),
    ),
)
