"""Swin and Swin V2, by every library that names them."""

from __future__ import annotations

from .table import family

BIAS_TABLE = "attn.relative_position_bias_table"
CPB = "attn.cpb_mlp.*.weight attn.logit_scale"  # continuous position bias of Swin V2
PATCH_EMBED = "patch_embed..weight"
HEAD = "(head|head_dist)..weight"

# Transformers 5 names its Swin and ViT attention so in memory, and the older way on disk.
HF_MEMORY = ("attention.{q,k,v}_proj", "attention.o_proj", "mlp.fc1 mlp.fc2")
HF_DISK = (
    "attention.self.{query,key,value}",
    "attention.output.dense",
    "intermediate.dense output.dense",
)
HF_AUX = (
    "embeddings.patch_embeddings.projection.weight embeddings.(cls|distillation|mask)_token "
    "embeddings.position_embeddings pooler.dense.weight (cls_|distillation_)?classifier..weight "
    "decoder.0.weight"  # of masked image modelling
)
_MERGE = "downsample.reduction.weight"

FAMILIES = (
    family(
        "swin: timm swin, swin_s3, swinv2; Microsoft's original Swin files; SwinIR, HTSAT",
        # layers_0 is what timm's features_only=True makes of layers.0; SwinIR has groups
        "layers[._]<stage>.(residual_group.)?blocks.<block>.",
        network="swin",
        block_aux=f"{BIAS_TABLE} {CPB}",
        aux=f"{PATCH_EMBED} absolute_pos_embed mask_token layers[._]*.{_MERGE} {HEAD}",
    ),
    family(
        "swinv2_cr: timm swinv2_cr",
        "stages[._]<stage>.blocks.<block>.",
        block_aux="attn.meta_mlp.fc[12].weight",
        aux=f"{PATCH_EMBED} stages[._]*.{_MERGE} {HEAD}",
    ),
    family(
        "torchvision_swin: torchvision swin, swin_v2",
        # features.0 embeds the patches; then stages and mergings take turns
        r"features.<stage:\d{0,3}[13579]>.<block>.",
        network="swin",
        mlp="mlp.0 mlp.3",
        stages=range(1, 1000, 2),
        block_aux=f"{BIAS_TABLE} {CPB}",
        aux=rf"features.0.0.weight features.\d{{0,3}}[02468].reduction.weight {HEAD}",
    ),
    family(
        "hf_swin: Hugging Face Swin in memory",
        "encoder.layers.<stage>.blocks.<block>.",
        *HF_MEMORY,
        network="swin",
        block_aux="attention.relative_position_bias.relative_position_bias_table",
        aux=f"{HF_AUX} encoder.layers.*.{_MERGE}",
    ),
    family(
        "hf_swin_disk: Hugging Face Swin on disk and before Transformers 5, SwinV2, Donut, "
        "CLAP, Swin2SR",
        "encoder.(layers|stages).<stage>.(blocks|layers).<block>.",
        *HF_DISK,
        network="swin",
        block_aux="attention.self.relative_position_bias_table attention.self.logit_scale "
        "attention.self.continuous_position_bias_mlp.*.weight",
        aux=f"{HF_AUX} encoder.layers.*.{_MERGE}",
    ),
    family(
        "mm_swin: Swin of mmdetection, mmsegmentation, mmpretrain",
        "stages.<stage>.blocks.<block>.",
        qkv="attn.w_msa.qkv",
        proj="attn.w_msa.proj",
        mlp="ffn.layers.0.0 ffn.layers.1",
        network="swin",
        block_aux="attn.w_msa.relative_position_bias_table attn.w_msa.cpb_mlp.*.weight "
        "attn.w_msa.logit_scale",
        aux="patch_embed.projection.weight (absolute_pos_embed|pos_embed) head.fc.weight "
        f"stages.*.{_MERGE}",
    ),
    family(
        "monai_swin: SwinUNETR of MONAI",
        r"layers<stage:\d>.*.blocks.<block>.",
        mlp="mlp.linear1 mlp.linear2",
        network="swin",
        stages=range(1, 10),
        block_aux=BIAS_TABLE,
        aux=rf"{PATCH_EMBED} layers\d.*.{_MERGE}",
    ),
)
