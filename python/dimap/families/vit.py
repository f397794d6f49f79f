"""Plain vision transformers: blocks of one width, one after the other."""

from __future__ import annotations

from .swin import BIAS_TABLE, FUSED, HEAD, HF_AUX, HF_DENSE, HF_MEMORY, PATCH_EMBED
from .table import Family, Row, named

SPLIT = (
    named("qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
    named("qkv", "attn.q", "attn.k", "attn.v"),
)
GATED = (
    named("mlp", "mlp.fc1_g", "mlp.fc1_x", name="fc1"),
    named("mlp", "mlp.w0", "mlp.w1", name="w01"),
)
VIT_AUX = (
    r"(?:cls|dist|reg|mask)_token",
    r"pos_embed(?:_win|_window)?",
    r"shared_rel_pos\.relative_position_bias_table",
    r"shared_rel_pos\.mlp\.fc[12]\.weight",
    r"rope\.freqs",
    r"embeds\..+",
    PATCH_EMBED,
    r"attn_pool\..+",
    r"(?:merger|aligner)\..+",
    r"neck\.\d+\.weight",
    r"pre_logits\.fc\.weight",
    HEAD,
)
REL_POS = (
    BIAS_TABLE,
    r"attn\.rel_pos\.relative_position_bias_table",
    r"attn\.rel_pos\.mlp\.fc[12]\.weight",
    r"attn\.rel_pos_[hw]",
)
HF_VIT_AUX = (
    *HF_AUX,
    r"embeddings\.register_tokens",
    # of BEiT, shared by its blocks
    r"(?:shared_position_bias|encoder\.relative_position_bias)\.relative_position_bias_table",
    r"lm_head\.weight",  # BEiT's masked image modelling
)

FAMILIES = (
    Family(
        name="vit",
        models="timm ViT, DeiT (also distilled), DeiT3, BEiT, EVA, EVA02, DINOv2, DINOv3, SigLIP, SAM",
        network="vit",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(
            FUSED[0],
            SPLIT[0],
            FUSED[1],
            FUSED[2],
            *GATED,
            FUSED[3],
            named("mlp", "mlp.w2"),
            named("mlp", "mlp.w12"),
            named("mlp", "mlp.w3"),
            *(named("mlp", f"mlp.{name}{n}") for n in (1, 2) for name in ("lin", "linear_fc")),
            named("mlp", "mlp.gate_proj", "mlp.up_proj", name="gate_up_proj"),
            named("mlp", "mlp.down_proj"),
        ),
        block_aux=REL_POS,
        aux=VIT_AUX,
    ),
    Family(
        name="vit_parallel",
        models="timm ViT with parallel blocks (18x2)",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(
            Row("qkv", (r"attns\.\d+\.attn\.qkv\.weight",)),
            Row("proj", (r"attns\.\d+\.attn\.proj\.weight",)),
            Row("mlp", (r"ffns\.\d+\.mlp\.fc1\.weight",)),
            Row("mlp", (r"ffns\.\d+\.mlp\.fc2\.weight",)),
        ),
        aux=VIT_AUX,
        per_block=({"qkv": 2, "proj": 2, "mlp": 4},),
    ),
    Family(
        name="gemma_vit",
        models="the vision tower of Gemma 4, in timm and Hugging Face",
        block=r"(?:blocks|layers)\.(?P<block>\d+)\.",
        rows=(
            Row("qkv", tuple(rf"(?:self_)?attn\.{x}_proj\.linear\.weight" for x in "qkv")),
            Row("proj", (r"(?:self_)?attn\.o_proj\.linear\.weight",)),
            Row(
                "mlp",
                tuple(rf"mlp\.{x}_proj\.linear\.weight" for x in ("gate", "up")),
                name="gate_up_proj",
            ),
            Row("mlp", (r"mlp\.down_proj\.linear\.weight",)),
        ),
        aux=(r"patch_embed\..+", r"patch_embedder\..+"),
    ),
    Family(
        name="hf_sam",
        models="Hugging Face SAM, SAM-HQ, ViTDet",
        network="vit",
        block=r"layers?\.(?P<block>\d+)\.",
        rows=(
            Row("qkv", (r"(?:attn|attention)\.qkv\.weight",)),
            Row("proj", (r"(?:attn|attention)\.proj\.weight",)),
            Row("mlp", (r"mlp\.(?:lin1|fc1)\.weight",)),
            Row("mlp", (r"mlp\.(?:lin2|fc2)\.weight",)),
        ),
        block_aux=(r"(?:attn|attention)\.rel_pos_[hw]",),
        aux=(r"patch_embed\..+", r"pos_embed", r"neck\..+", r"embeddings\..+"),
    ),
    Family(
        name="torchvision_vit",
        models="torchvision ViT",
        network="vit",
        block=r"encoder\.layers\.encoder_layer_(?P<block>\d+)\.",
        rows=(
            Row("qkv", (r"self_attention\.in_proj_weight",)),
            named("proj", "self_attention.out_proj"),
            Row("mlp", (r"mlp\.(?:0|linear_1)\.weight",)),
            Row("mlp", (r"mlp\.(?:3|linear_2)\.weight",)),
        ),
        aux=(
            r"class_token",
            r"encoder\.pos_embedding",
            r"conv_proj\.(?:.+\.)?weight",
            r"heads\.(?:.+\.)?weight",
        ),
    ),
    Family(
        name="hf_vit",
        models="Hugging Face ViT, DeiT, BEiT, DINOv2 in memory, DINOv3",
        network="vit",
        block=r"layers?\.(?P<block>\d+)\.",
        rows=(
            *HF_MEMORY[:2],
            HF_MEMORY[2],
            named("mlp", "mlp.gate_proj", "mlp.up_proj", name="gate_up_proj", optional=(0,)),
            named("mlp", "mlp.weights_in"),
            HF_MEMORY[3],
            named("mlp", "mlp.down_proj"),
            named("mlp", "mlp.weights_out"),
        ),
        block_aux=(r"(?:attention\.)?relative_position_bias\.relative_position_bias_table",),
        aux=HF_VIT_AUX,
    ),
    Family(
        name="hf_vit_disk",
        models="Hugging Face ViT, DeiT, BEiT, DINOv2 on disk and before Transformers 5",
        network="vit",
        block=r"encoder\.layer\.(?P<block>\d+)\.",
        rows=(
            named(
                "qkv",
                "attention.attention.query",
                "attention.attention.key",
                "attention.attention.value",
            ),
            *HF_DENSE[:2],
            named("mlp", "mlp.fc1"),
            named("mlp", "mlp.weights_in"),
            HF_DENSE[2],
            named("mlp", "mlp.fc2"),
            named("mlp", "mlp.weights_out"),
        ),
        block_aux=(r"attention\.attention\.relative_position_bias\.relative_position_bias_table",),
        aux=HF_VIT_AUX,
    ),
)
