"""Swin and Swin V2, by every library that names them."""

from __future__ import annotations

from .table import Family, named

FUSED = (
    named("qkv", "attn.qkv"),
    named("proj", "attn.proj"),
    named("mlp", "mlp.fc1"),
    named("mlp", "mlp.fc2"),
)
BIAS_TABLE = r"attn\.relative_position_bias_table"
CPB = (r"attn\.cpb_mlp\.\d+\.weight", r"attn\.logit_scale")  # continuous position bias of Swin V2
PATCH_EMBED = r"patch_embed\.(?:.+\.)?weight"
HEAD = r"(?:head|head_dist)\.(?:.+\.)?weight"

# Transformers 5 names its Swin and ViT attention like this in memory, and the older way on disk.
HF_MEMORY = (
    named("qkv", "attention.q_proj", "attention.k_proj", "attention.v_proj"),
    named("proj", "attention.o_proj"),
    named("mlp", "mlp.fc1"),
    named("mlp", "mlp.fc2"),
)
HF_DENSE = (
    named("proj", "attention.output.dense"),
    named("mlp", "intermediate.dense"),
    named("mlp", "output.dense"),
)
HF_AUX = (
    r"embeddings\.patch_embeddings\.projection\.weight",
    r"embeddings\.(?:cls|distillation|mask)_token",
    r"embeddings\.position_embeddings",
    r"pooler\.dense\.weight",
    r"(?:cls_|distillation_)?classifier\.(?:.+\.)?weight",
    r"decoder\.0\.weight",  # masked image modelling
)

_STAGE = r"encoder\.layers\.(?P<stage>\d+)\."
_BLOCK = _STAGE + r"blocks\.(?P<block>\d+)\."
_MERGE = r"encoder\.layers\.\d+\.downsample\.reduction\.weight"

FAMILIES = (
    Family(
        name="swin",
        models="timm swin, swin_s3, swinv2; Microsoft's original Swin files; SwinIR, HTSAT",
        network="swin",
        # layers_0 is what timm's features_only=True makes of layers.0; SwinIR has groups
        block=r"layers[._](?P<stage>\d+)\.(?:residual_group\.)?blocks\.(?P<block>\d+)\.",
        stage=r"layers[._](?P<stage>\d+)\.",
        rows=FUSED,
        block_aux=(BIAS_TABLE, *CPB),
        aux=(
            PATCH_EMBED,
            r"absolute_pos_embed",
            r"mask_token",
            r"layers[._]\d+\.downsample\.reduction\.weight",
            HEAD,
        ),
    ),
    Family(
        name="swinv2_cr",
        models="timm swinv2_cr",
        block=r"stages[._](?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"stages[._](?P<stage>\d+)\.",
        rows=FUSED,
        block_aux=(r"attn\.meta_mlp\.fc[12]\.weight",),
        aux=(PATCH_EMBED, r"stages[._]\d+\.downsample\.reduction\.weight", HEAD),
    ),
    Family(
        name="torchvision_swin",
        models="torchvision swin, swin_v2",
        network="swin",
        # features.0 embeds the patches; then stages and mergings take turns
        block=r"features\.(?P<stage>\d*[13579])\.(?P<block>\d+)\.",
        stages=range(1, 1000, 2),
        rows=(*FUSED[:2], named("mlp", "mlp.0"), named("mlp", "mlp.3")),
        block_aux=(BIAS_TABLE, *CPB),
        aux=(r"features\.0\.0\.weight", r"features\.\d*[02468]\.reduction\.weight", HEAD),
    ),
    Family(
        name="hf_swin",
        models="Hugging Face Swin in memory",
        network="swin",
        block=_BLOCK,
        stage=_STAGE,
        rows=HF_MEMORY,
        block_aux=(r"attention\.relative_position_bias\.relative_position_bias_table",),
        aux=(*HF_AUX, _MERGE),
    ),
    Family(
        name="hf_swin_disk",
        models="Hugging Face Swin on disk and before Transformers 5, SwinV2, Donut, CLAP, Swin2SR",
        network="swin",
        block=r"encoder\.(?:layers|stages)\.(?P<stage>\d+)\.(?:blocks|layers)\.(?P<block>\d+)\.",
        stage=r"encoder\.(?:layers|stages)\.(?P<stage>\d+)\.",
        rows=(
            named("qkv", "attention.self.query", "attention.self.key", "attention.self.value"),
            *HF_DENSE,
        ),
        block_aux=(
            r"attention\.self\.relative_position_bias_table",
            r"attention\.self\.logit_scale",
            r"attention\.self\.continuous_position_bias_mlp\.\d+\.weight",
        ),
        aux=(*HF_AUX, _MERGE),
    ),
    Family(
        name="mm_swin",
        models="Swin of mmdetection, mmsegmentation, mmpretrain",
        network="swin",
        block=r"stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"stages\.(?P<stage>\d+)\.",
        rows=(
            named("qkv", "attn.w_msa.qkv"),
            named("proj", "attn.w_msa.proj"),
            named("mlp", "ffn.layers.0.0"),
            named("mlp", "ffn.layers.1"),
        ),
        block_aux=(
            r"attn\.w_msa\.relative_position_bias_table",
            r"attn\.w_msa\.cpb_mlp\.\d+\.weight",
            r"attn\.w_msa\.logit_scale",
        ),
        aux=(
            r"patch_embed\.projection\.weight",
            r"(?:absolute_pos_embed|pos_embed)",
            r"stages\.\d+\.downsample\.reduction\.weight",
            r"head\.fc\.weight",
        ),
    ),
    Family(
        name="monai_swin",
        models="SwinUNETR of MONAI",
        network="swin",
        block=r"layers(?P<stage>\d)\.\d+\.blocks\.(?P<block>\d+)\.",
        stage=r"layers(?P<stage>\d)\.",
        stages=range(1, 10),
        rows=(*FUSED[:2], named("mlp", "mlp.linear1"), named("mlp", "mlp.linear2")),
        block_aux=(BIAS_TABLE,),
        aux=(PATCH_EMBED, r"layers\d\.\d+\.downsample\.reduction\.weight"),
    ),
)
