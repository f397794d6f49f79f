"""The model families that dimap knows by their parameter names: data only, read by `groups`.

Every pattern is a regular expression that must match a whole name (`re.fullmatch`), never a part
of one: `meta_mlp.fc1` ends in `mlp.fc1`, `attention.output.dense` in `output.dense`. Before any
family is tried, components in `WRAPPERS` are dropped wherever they stand, and names in `BUFFERS`
are set aside. A family's patterns are then read as

    parts, block_aux:  prefix + block + pattern        aux:  prefix + pattern

where prefix is any chain of `PREFIXES`, then the family's own `prefix`.

A family is recognised only if every parameter of two or more dimensions is claimed, by a row (to be
pruned) or by an aux pattern (never pruned), and every block has as many layers as `per_block` says.
Biases, norms and other parameters of fewer dimensions are aux without being named. To add a family,
add a `Family`; nothing else has to change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A kind of prunable layer.

    parts: patterns relative to the block. One is one tensor. Several are the tensors of one layer,
        joined by what they capture and ranked in this order: q, k, v; q, kv; fc1_g, fc1_x.
    name: last component of the name of a layer of several tensors; by default the module's name.
    ndim: how many dimensions the weights must have.
    """

    module: str
    parts: tuple[str, ...]
    name: str = ""
    ndim: int = 2


def named(module: str, *names: str) -> Row:
    """A row of tensors that are called exactly so within the block; `.weight` is left out."""
    return Row(module, tuple(re.escape(f"{name}.weight") for name in names))


@dataclass(frozen=True)
class Family:
    """Names of one family of models.

    block: beginning of a block's names, with `(?P<block>…)`, a number from 0 within the stage, and
        where there are stages `(?P<stage>…)`; the stage is the captured number's place in `stages`.
    stage: beginning of a stage's names, to locate parameters that belong to no block.
    prefix: what may stand before the names, an optional group; it must be the same for all blocks.
    per_block: layers of each block, by module; a module that it leaves out is not counted.
    """

    name: str
    models: str
    block: str
    rows: tuple[Row, ...]
    block_aux: tuple[str, ...] = ()
    aux: tuple[str, ...] = ()
    prefix: str = ""
    stage: str = ""
    stages: range = range(1000)
    per_block: Mapping[str, int] = field(
        default_factory=lambda: {"qkv": 1, "proj": 1, "mlp": 2}, hash=False
    )


# Components that torch inserts into names: torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Components in front of a network inside another: DDP, a training class, a detector.
PREFIXES = ("module", "model", "backbone")

# Entries of a state dict that are no parameters; an nn.Module does not list them as such.
BUFFERS = (
    r"(?:.+\.)?(?:relative_position_index|relative_coords_table|attn_mask)",
    r"(?:.+\.)?(?:running_mean|running_var|num_batches_tracked)",
)

_QKV = named("qkv", "attn.qkv")
_PROJ = named("proj", "attn.proj")
_FC1 = named("mlp", "mlp.fc1")
_FC2 = named("mlp", "mlp.fc2")

_BIAS_TABLE = r"attn\.relative_position_bias_table"
_CPB = (r"attn\.cpb_mlp\.\d+\.weight", r"attn\.logit_scale")  # continuous position bias of Swin V2
_PATCH_EMBED = r"patch_embed\.(?:.+\.)?weight"
_HEAD = r"(?:head|head_dist)\.(?:.+\.)?weight"

# Transformers 5 names its Swin and ViT attention like this in memory, and the older way on disk.
_HF_MEMORY = (
    named("qkv", "attention.q_proj", "attention.k_proj", "attention.v_proj"),
    named("proj", "attention.o_proj"),
    _FC1,
    _FC2,
)
_HF_DENSE = (
    named("proj", "attention.output.dense"),
    named("mlp", "intermediate.dense"),
    named("mlp", "output.dense"),
)
_HF_AUX = (
    r"embeddings\.patch_embeddings\.projection\.weight",
    r"embeddings\.(?:cls|distillation|mask)_token",
    r"embeddings\.position_embeddings",
    r"pooler\.dense\.weight",
    r"(?:cls_|distillation_)?classifier\.(?:.+\.)?weight",
    r"decoder\.0\.weight",  # masked image modelling
)
_HF_VIT_AUX = (
    *_HF_AUX,
    # of BEiT, shared by its blocks
    r"(?:shared_position_bias|encoder\.relative_position_bias)\.relative_position_bias_table",
    r"lm_head\.weight",  # BEiT's masked image modelling
)
_HF_SWIN_PREFIX = r"(?:swin\.|swinv2\.)?"
_HF_SWIN_STAGE = r"encoder\.layers\.(?P<stage>\d+)\."
_HF_SWIN_BLOCK = _HF_SWIN_STAGE + r"blocks\.(?P<block>\d+)\."
_HF_SWIN_MERGE = r"encoder\.layers\.\d+\.downsample\.reduction\.weight"
_HF_VIT_PREFIX = r"(?:vit\.|deit\.|beit\.)?"

FAMILIES: tuple[Family, ...] = (
    Family(
        name="swin",
        models="timm swin, swin_s3, swinv2; Microsoft's original Swin files",
        # layers_0 is what timm's features_only=True makes of layers.0
        block=r"layers[._](?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"layers[._](?P<stage>\d+)\.",
        rows=(_QKV, _PROJ, _FC1, _FC2),
        block_aux=(_BIAS_TABLE, *_CPB),
        aux=(
            _PATCH_EMBED,
            r"absolute_pos_embed",
            r"layers[._]\d+\.downsample\.reduction\.weight",
            _HEAD,
        ),
    ),
    Family(
        name="swinv2_cr",
        models="timm swinv2_cr",
        block=r"stages[._](?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"stages[._](?P<stage>\d+)\.",
        rows=(_QKV, _PROJ, _FC1, _FC2),
        block_aux=(r"attn\.meta_mlp\.fc[12]\.weight",),
        aux=(_PATCH_EMBED, r"stages[._]\d+\.downsample\.reduction\.weight", _HEAD),
    ),
    Family(
        name="torchvision_swin",
        models="torchvision swin, swin_v2",
        # features.0 embeds the patches; then stages and mergings take turns
        block=r"features\.(?P<stage>\d*[13579])\.(?P<block>\d+)\.",
        stages=range(1, 1000, 2),
        rows=(_QKV, _PROJ, named("mlp", "mlp.0"), named("mlp", "mlp.3")),
        block_aux=(_BIAS_TABLE, *_CPB),
        aux=(r"features\.0\.0\.weight", r"features\.\d*[02468]\.reduction\.weight", _HEAD),
    ),
    Family(
        name="hf_swin",
        models="Hugging Face Swin in memory",
        prefix=_HF_SWIN_PREFIX,
        block=_HF_SWIN_BLOCK,
        stage=_HF_SWIN_STAGE,
        rows=_HF_MEMORY,
        block_aux=(r"attention\.relative_position_bias\.relative_position_bias_table",),
        aux=(*_HF_AUX, _HF_SWIN_MERGE),
    ),
    Family(
        name="hf_swin_disk",
        models="Hugging Face Swin on disk and before Transformers 5, SwinV2",
        prefix=_HF_SWIN_PREFIX,
        block=_HF_SWIN_BLOCK,
        stage=_HF_SWIN_STAGE,
        rows=(
            named("qkv", "attention.self.query", "attention.self.key", "attention.self.value"),
            *_HF_DENSE,
        ),
        block_aux=(
            r"attention\.self\.relative_position_bias_table",
            r"attention\.self\.logit_scale",
            r"attention\.self\.continuous_position_bias_mlp\.\d+\.weight",
        ),
        aux=(*_HF_AUX, _HF_SWIN_MERGE),
    ),
    Family(
        name="vit",
        models="timm ViT, DeiT (also distilled), DeiT3, BEiT",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(_QKV, _PROJ, _FC1, _FC2),
        block_aux=(
            _BIAS_TABLE,
            r"attn\.rel_pos\.relative_position_bias_table",
            r"attn\.rel_pos\.mlp\.fc[12]\.weight",
        ),
        aux=(
            r"(?:cls|dist|reg|mask)_token",
            r"pos_embed",
            r"shared_rel_pos\.relative_position_bias_table",
            r"shared_rel_pos\.mlp\.fc[12]\.weight",
            r"rope\.freqs",
            _PATCH_EMBED,
            r"attn_pool\..+",
            r"pre_logits\.fc\.weight",
            _HEAD,
        ),
    ),
    Family(
        name="torchvision_vit",
        models="torchvision ViT",
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
        models="Hugging Face ViT, DeiT, BEiT in memory",
        prefix=_HF_VIT_PREFIX,
        block=r"layers\.(?P<block>\d+)\.",
        rows=_HF_MEMORY,
        block_aux=(r"relative_position_bias\.relative_position_bias_table",),
        aux=_HF_VIT_AUX,
    ),
    Family(
        name="hf_vit_disk",
        models="Hugging Face ViT, DeiT, BEiT on disk and before Transformers 5",
        prefix=_HF_VIT_PREFIX,
        block=r"encoder\.layer\.(?P<block>\d+)\.",
        rows=(
            named(
                "qkv",
                "attention.attention.query",
                "attention.attention.key",
                "attention.attention.value",
            ),
            *_HF_DENSE,
        ),
        block_aux=(r"attention\.attention\.relative_position_bias\.relative_position_bias_table",),
        aux=_HF_VIT_AUX,
    ),
)
