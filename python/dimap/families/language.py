"""Models of language, and the encoders of text, images and speech that are named like them."""

from __future__ import annotations

from functools import partial

from .table import family

_LAYERS = "layers.<block>."
_ONCE = (1, 1, 2)
_TWICE = (2, 2, 2)  # a decoder that looks at an encoder
_MANY = (None, None, None)

_EMBED = (
    "(embed_tokens|embed_positions|embed_in|wte|wpe|word_embeddings|shared|tok_embeddings"
    "|tokens_embed|positions_embed).weight"
)
_HEAD = "(lm_head|score|classifier|embed_out|output|head)..weight"
_BERT_AUX = (
    "embeddings... embeddings_project.weight pooler..weight encoder.rel_embeddings.weight "
    "(cls|lm_head|generator_predictions|discriminator_predictions|qa_outputs|classifier"
    "|pre_classifier|vocab_transform|vocab_projector)..."
)
_EXPERTS = "(mlp|block_sparse_moe).experts.<expert>."
_H = "mlp.dense_h_to_4h mlp.dense_4h_to_h"


def _gated(mlp: str) -> str:
    return f"{mlp}.gate_up_proj {mlp}.{{gate?,up}}_proj=gate_up_proj {mlp}.down_proj "


_LLAMA = (
    # with those of latent attention
    "self_attn.qkv_proj self_attn.{q,k?,v?}_proj self_attn.q_a_proj self_attn.q_b_proj "
    "self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.(gate_proj|output_gate) "
    "encoder_attn.{q,k,v}_proj cross_attn.{q,k,v}_proj",
    "self_attn.(o_proj|dense) encoder_attn.o_proj cross_attn.o_proj",
    # a tensor of all experts in memory, a tensor for each on disk
    "mlp.fc1 mlp.fc2 " + _gated("mlp") + "mlp.experts.gate_up_proj[*] "
    f"{_EXPERTS}{{(gate_proj|w1),(up_proj|w3)}}=gate_up_proj mlp.experts.down_proj[*] "
    f"{_EXPERTS}(down_proj|w2) " + _gated("mlp.shared_expert") + _gated("mlp.shared_experts"),
)
_LLAMA_AUX = (
    "(mlp|block_sparse_moe).(gate|router)..weight mlp.shared_expert_gate.weight "
    "mlp.experts.(gate_up|down)_proj_bias mlp.(gate|moe_statics).(moe_statics.)?"
    "e_score_correction_bias per_layer_(input_gate|projection).weight (altup|laurel)... "
    "self_attn.indexer..."
)

# A model of words, with its embedding and its head.
_decoder = partial(family, aux=f"{_EMBED} {_HEAD}", language=True)

FAMILIES = (
    _decoder(
        "llama: Llama, Qwen2, Qwen3, Qwen-MoE, Mistral, Mixtral, Gemma, Phi, Phi-3, DeepSeek, "
        "gpt-oss, Granite, OLMo, SmolLM, StableLM and others of their names",
        _LAYERS,
        *_LLAMA,
        network="llama",
        block_aux=_LLAMA_AUX,
        per_block=[_MANY],
    ),
    _decoder(
        "llama_hybrid: Qwen3-Next, Qwen3.5, MiniMax and others whose blocks have linear "
        "attention in turn",
        _LAYERS,
        *_LLAMA,
        network="llama",
        mark="linear_attn...",
        block_aux=f"{_LLAMA_AUX} linear_attn...",
        per_block=[_MANY, (0, 0, None)],
    ),
    _decoder(
        "llama_original: Llama and Mistral as their makers store them",
        _LAYERS,
        qkv="attention.{wq,wk,wv}",
        proj="attention.wo",
        mlp="feed_forward.{w1,w3}=w13 feed_forward.w2",
        network="llama",
    ),
    _decoder(
        "gpt2: GPT-2, GPT-BigCode",
        "h.<block>.",
        qkv="attn.c_attn crossattention.q_attn crossattention.c_attn",
        proj="attn.c_proj crossattention.c_proj",
        mlp="mlp.c_fc mlp.c_proj",
        block_aux="(attn|crossattention).(masked_)?bias",
        per_block=[_ONCE, (3, 2, 2)],
    ),
    _decoder(
        "gpt_neox: GPT-NeoX, Pythia",
        _LAYERS,
        qkv="attention.query_key_value",
        proj="attention.dense",
        mlp=_H,
        block_aux="attention.(masked_)?bias",
    ),
    _decoder(
        "bloom: BLOOM, Falcon",
        "h.<block>.",
        qkv="self_attention.query_key_value",
        proj="self_attention.dense",
        mlp=_H,
    ),
    _decoder(
        "gptj: GPT-J, GPT-Neo, CodeGen",
        "h.<block>.",
        qkv="attn.qkv_proj attn.{q,k,v}_proj attn.attention.{q,k,v}_proj",
        proj="attn.out_proj attn.attention.out_proj",
        mlp="mlp.fc_in mlp.fc_out mlp.c_fc mlp.c_proj",
        block_aux="attn.(attention.)?(masked_|causal_)?(bias|mask)",
    ),
    _decoder(
        "mpt: MPT",
        "blocks.<block>.",
        qkv="attn.Wqkv",
        proj="attn.out_proj",
        mlp="ffn.up_proj ffn.down_proj",
    ),
    family(
        "clip: CLIP, SigLIP, Whisper, OPT, BART, MBart, Pegasus and others of their names",
        _LAYERS,
        qkv="self_attn.{q,k,v}_proj encoder_attn.{q,k,v}_proj",
        proj="self_attn.out_proj encoder_attn.out_proj",
        mlp="mlp.fc1 mlp.fc2 fc1 fc2",
        aux=f"embeddings... (visual|text)_projection.weight head... conv[12].weight {_EMBED} {_HEAD} "
        "(project_in|project_out).weight",
        per_block=[_ONCE, _TWICE],
        language=True,
    ),
    family(
        "open_clip: CLIP of OpenAI and open_clip",
        "resblocks.<block>.",
        qkv="attn.in_proj_weight",
        proj="attn.out_proj",
        mlp="mlp.c_fc mlp.c_proj",
        aux=r"(\S+)?(positional|class|token)_embedding(.weight)? (proj|text_projection)",
    ),
    family(
        "whisper_original: Whisper of OpenAI",
        "blocks.<block>.",
        qkv="attn.{query,key,value} cross_attn.{query,key,value}",
        proj="attn.out cross_attn.out",
        mlp="mlp.0 mlp.2",
        aux="(conv[12]|token_embedding).weight positional_embedding",
        per_block=[_ONCE, _TWICE],
    ),
    family(
        "bert: BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DeBERTa, BLIP's text and others of "
        "their names",
        "layer.<block>.",
        qkv="attention.self.{query,key,value} attention.self.{query,key,value}_proj "
        "crossattention.self.{query,key,value}",
        proj="attention.output.dense crossattention.output.dense",
        mlp="intermediate.dense output.dense",
        block_aux="attention.self.(pos_key_proj|pos_query_proj|pos_proj|pos_q_proj).weight "
        "(cross)?attention.self.distance_embedding.weight",
        aux=_BERT_AUX,
        per_block=[_ONCE, _TWICE],
    ),
    family(
        "distilbert: DistilBERT",
        "layer.<block>.",
        qkv="attention.{q,k,v}_lin",
        proj="attention.out_lin",
        mlp="ffn.lin1 ffn.lin2",
        aux=_BERT_AUX,
    ),
    family(
        "albert: ALBERT",
        "albert_layer_groups.<stage>.albert_layers.<block>.",
        qkv="attention.{query,key,value}",
        proj="attention.dense",
        mlp="ffn ffn_output",
        aux=f"{_BERT_AUX} encoder.embedding_hidden_mapping_in.weight predictions...",
    ),
    family(
        "modernbert: ModernBERT",
        _LAYERS,
        qkv="attn.Wqkv",
        proj="attn.Wo",
        mlp="mlp.Wi mlp.Wo",
        aux=f"{_BERT_AUX} (head|decoder)...",
    ),
    _decoder(
        "t5: T5, mT5, UMT5, LongT5, Flan-T5",
        "block.<block>.layer.*.",
        qkv="(SelfAttention|LocalSelfAttention).{q,k,v} EncDecAttention.{q,k,v}",
        proj="(SelfAttention|LocalSelfAttention).o EncDecAttention.o",
        mlp="DenseReluDense.wi DenseReluDense.{wi_0,wi_1}=wi DenseReluDense.wo",
        block_aux="(Local|EncDec)?(Self)?Attention.(global_)?relative_attention_bias.weight",
        per_block=[_ONCE, _TWICE],
    ),
    family(
        "wav2vec2: wav2vec 2.0, HuBERT, WavLM, data2vec-audio",
        _LAYERS,
        qkv="attention.{q,k,v}_proj",
        proj="attention.out_proj",
        mlp="feed_forward.intermediate_dense feed_forward.output_dense",
        block_aux="attention.(gru_)?rel_(attn_embed|pos_linear).weight",
        aux="feature_extractor... feature_projection... encoder.pos_conv_embed...",
    ),
)
