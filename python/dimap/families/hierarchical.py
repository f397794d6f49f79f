"""Hierarchical vision transformers of timm: stages of different width, hybrids, class attention."""

from __future__ import annotations

from .swin import FUSED, HEAD, HF_DENSE, HF_MEMORY, PATCH_EMBED
from .table import POINTWISE, Counts, Family, named
from .vit import SPLIT, VIT_AUX

_STAGE = r"stages[._](?P<stage>\d+)\."
_BLOCK = _STAGE + r"blocks\.(?P<block>\d+)\."
_HEAD = r"(?:head|head_dist|aux_head)\.(?:.+\.)?weight"
_STEM = r"(?:stem|patch_embed)\.(?:.+\.)?weight"
_DOWN = r"stages[._]\d+\.downsample\.(?:.+\.)?weight"
_AUX = (_STEM, _DOWN, _HEAD, r"(?:cls_token|pos_embed)")
_WHOLE: Counts = {"qkv": 1, "proj": 1, "mlp": 2}
_NONE: Counts = {"qkv": 0, "proj": 0, "mlp": 0}  # a block of convolutions
_MLP: Counts = {"qkv": 0, "proj": 0, "mlp": 2}

_ANY = tuple(
    named(module, name, ndims=POINTWISE)
    for module, name in (
        ("qkv", "attn.qkv"),
        ("proj", "attn.proj"),
        ("mlp", "mlp.fc1"),
        ("mlp", "mlp.fc2"),
    )
)
_POS = (r"attn\.rel_pos\.relative_position_bias_table", r"attn\.rel_pos\.mlp\.fc[12]\.weight")
_CONV = (
    r"conv[123]_(?:1x1|kxk|dw)\.weight",
    r"conv_dw\.weight",
    r"se(?:_early)?\.fc[12]\.weight",
    r"shortcut\.expand\.weight",
)


def _within(prefix: str, *patterns: str) -> tuple[str, ...]:
    return tuple(prefix + pattern for pattern in patterns)


FAMILIES = (
    Family(
        name="pvt_v2",
        models="timm PVTv2",
        block=_BLOCK,
        stage=_STAGE,
        rows=(named("qkv", "attn.q", "attn.kv"), *FUSED[1:]),
        block_aux=(r"attn\.sr\.weight", r"mlp\.dwconv\.weight"),
        aux=_AUX,
    ),
    Family(
        name="twins",
        models="timm Twins (PCPVT, SVT)",
        block=r"blocks\.(?P<stage>\d+)\.(?P<block>\d+)\.",
        rows=(FUSED[0], named("qkv", "attn.q", "attn.kv"), *FUSED[1:]),
        block_aux=(r"attn\.sr\.weight",),
        aux=(r"patch_embeds\.\d+\.proj\.weight", r"pos_block\.\d+\.proj\.\d+\.weight", HEAD),
    ),
    Family(
        name="mvitv2",
        models="timm MViTv2",
        block=_BLOCK,
        stage=_STAGE,
        rows=FUSED,
        block_aux=(
            r"attn\.pool_[qkv]\.weight",
            r"attn\.rel_pos_[hw]",
            r"shortcut_proj_(?:attn|mlp)\.weight",
        ),
        aux=_AUX,
    ),
    Family(
        name="coatnet",
        models="timm CoAtNet, CoAtNeXt",
        block=_BLOCK,
        stage=_STAGE,
        rows=_ANY,
        mark=r"conv(?:1_1x1|_dw)\.weight",
        block_aux=(*_POS, *_CONV),
        aux=_AUX,
        per_block=(_WHOLE, _NONE, _MLP),
    ),
    Family(
        name="maxvit",
        models="timm MaxViT, MaxxViT",
        block=_BLOCK,
        stage=_STAGE,
        rows=(
            *(
                named(module, f"attn_{part}.{name}")
                for part in ("block", "grid")
                for module, name in (
                    ("qkv", "attn.qkv"),
                    ("proj", "attn.proj"),
                    ("mlp", "mlp.fc1"),
                    ("mlp", "mlp.fc2"),
                )
            ),
            named("qkv", "attn.attn_block.qkv"),
            named("qkv", "attn.attn_grid.qkv"),
            named("proj", "attn.attn_block.proj"),
            named("proj", "attn.attn_grid.proj"),
            named("mlp", "attn.mlp.fc1"),
            named("mlp", "attn.mlp.fc2"),
        ),
        block_aux=(
            *_within(r"attn_(?:block|grid)\.", *_POS),
            r"attn\.attn_(?:block|grid)\.rel_pos\.relative_position_bias_table",
            *_within(r"conv\.(?:\d+\.)?", *_CONV, r"mlp\.fc[12]\.weight"),
        ),
        aux=_AUX,
        per_block=(
            {"qkv": 2, "proj": 2, "mlp": 4},
            {"qkv": 2, "proj": 2, "mlp": 2},  # block and grid side by side, with one MLP
            {"qkv": 1, "proj": 1, "mlp": 2},  # grid alone
        ),
    ),
    Family(
        name="hiera",
        models="timm Hiera, SAM 2's HieraDet",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=FUSED,
        block_aux=(r"proj\.weight",),
        mark=r"proj\.weight",
        aux=VIT_AUX,
    ),
    Family(
        name="focalnet",
        models="timm FocalNet",
        block=r"layers[._](?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"layers[._](?P<stage>\d+)\.",
        rows=(
            named("qkv", "modulation.f", ndims=POINTWISE),
            named("proj", "modulation.h", ndims=POINTWISE),
            named("proj", "modulation.proj", ndims=POINTWISE),
            *_ANY[2:],
        ),
        block_aux=(r"modulation\.focal_layers\.\d+\.\d+\.weight",),
        aux=(_STEM, r"layers[._]\d+\.downsample\.proj\.weight", _HEAD),
        per_block=({"qkv": 1, "proj": 2, "mlp": 2},),
    ),
    Family(
        name="efficientformer",
        models="timm EfficientFormer, CAFormer, FastViT with attention",
        block=_BLOCK,
        stage=_STAGE,
        rows=(
            named("qkv", "token_mixer.qkv"),
            named("proj", "token_mixer.proj"),
            *_ANY[2:],
        ),
        block_aux=(
            r"token_mixer\.attention_biases",
            r"token_mixer\.(?:pwconv[12]|dwconv)\.weight",
            r"token_mixer\.(?:norm|mixer)\.(?:.+\.)?weight",
            r"mlp\.conv\.conv\.weight",
            r"(?:token_mixer\.)?layer_scale(?:_[12])?\.gamma",
        ),
        aux=(*_AUX, r"stages[._]\d+\.pos_emb\..+", r"final_conv\..+"),
        per_block=(_WHOLE, _MLP),
    ),
    Family(
        name="efficientformer_v2",
        models="timm EfficientFormerV2",
        block=_BLOCK,
        stage=_STAGE,
        rows=tuple(
            named(module, *names, ndims=POINTWISE)
            for module, names in (
                ("qkv", ("token_mixer.q.conv", "token_mixer.k.conv", "token_mixer.v.conv")),
                ("proj", ("token_mixer.proj.conv",)),
                ("mlp", ("mlp.fc1.conv",)),
                ("mlp", ("mlp.fc2.conv",)),
            )
        ),
        block_aux=(
            r"token_mixer\.attention_biases",
            r"token_mixer\.(?:stride_conv|v_local)\.conv\.weight",
            r"token_mixer\.talking_head[12]\.weight",
            r"mlp\.mid\.conv\.weight",
        ),
        aux=(*_AUX, r"stages[._]\d+\.downsample\.attn\.attention_biases"),
        per_block=(_WHOLE, _MLP),
    ),
    Family(
        name="davit",
        models="timm DaViT, Florence-2's vision tower",
        # a spatial block and a channel block, or only one of them, in turn
        block=r"stages[._](?P<stage>\d+)\.blocks\.(?P<block>\d+)\.(?:\d|spatial_block|channel_block)\.",
        stage=_STAGE,
        rows=tuple(
            named(module, name)
            for module, name in (
                ("qkv", "attn.qkv"),
                ("proj", "attn.proj"),
                ("mlp", "mlp.fc1"),
                ("mlp", "mlp.fc2"),
            )
        ),
        block_aux=(r"cpe[12]\.proj\.weight",),
        aux=_AUX,
        per_block=({"qkv": 2, "proj": 2, "mlp": 4}, _WHOLE),
    ),
    Family(
        name="nest",
        models="timm NesT",
        block=r"levels\.(?P<stage>\d+)\.transformer_encoder\.(?P<block>\d+)\.",
        stage=r"levels\.(?P<stage>\d+)\.",
        rows=FUSED,
        aux=(PATCH_EMBED, r"levels\.\d+\.pos_embed", r"levels\.\d+\.pool\.conv\.weight", HEAD),
    ),
    Family(
        name="gcvit",
        models="timm GCViT",
        block=_BLOCK,
        stage=_STAGE,
        rows=FUSED,
        block_aux=_POS[:1],
        aux=(*_AUX, r"stages[._]\d+\.global_block\..+"),
    ),
    Family(
        name="cait",
        models="timm CaiT",
        block=r"(?P<stage>blocks|blocks_token_only)\.(?P<block>\d+)\.",
        stages=("blocks", "blocks_token_only"),
        rows=(FUSED[0], SPLIT[1], *FUSED[1:]),
        block_aux=(r"attn\.proj_[lw]\.weight",),
        mark=r"attn\.q\.weight",
        aux=VIT_AUX,
    ),
    Family(
        name="xcit",
        models="timm XCiT",
        block=r"(?P<stage>blocks|cls_attn_blocks)\.(?P<block>\d+)\.",
        stages=("blocks", "cls_attn_blocks"),
        rows=(FUSED[0], SPLIT[1], *FUSED[1:]),
        mark=r"attn\.temperature",
        block_aux=(r"attn\.temperature", r"local_mp\.conv[12]\.weight"),
        aux=(*VIT_AUX, r"pos_embed\.token_projection\.weight"),
    ),
    Family(
        name="tiny_vit",
        models="timm TinyViT",
        block=_BLOCK,
        stage=_STAGE,
        rows=FUSED,
        block_aux=(
            r"attn\.attention_biases",
            r"local_conv\.conv\.weight",
            r"conv[123]\.conv\.weight",
        ),
        aux=_AUX,
        per_block=(_WHOLE, _NONE),
    ),
    Family(
        name="pit",
        models="timm PiT",
        block=r"transformers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"transformers\.(?P<stage>\d+)\.",
        rows=FUSED,
        aux=(*_AUX, r"transformers\.\d+\.pool\.(?:.+\.)?weight"),
    ),
    Family(
        name="convit",
        models="timm ConViT",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(FUSED[0], named("qkv", "attn.qk", "attn.v"), *FUSED[1:]),
        block_aux=(r"attn\.pos_proj\.weight",),
        aux=VIT_AUX,
    ),
    Family(
        name="levit",
        models="timm LeViT",
        block=_BLOCK,
        stage=_STAGE,
        rows=tuple(
            named(module, name, ndims=POINTWISE)
            for module, name in (
                ("qkv", "attn.qkv.linear"),
                ("proj", "attn.proj.ln.linear"),
                ("mlp", "mlp.ln1.linear"),
                ("mlp", "mlp.ln2.linear"),
            )
        ),
        block_aux=(r"attn\.attention_biases",),
        aux=(*_AUX, r"stages[._]\d+\.downsample\.attn_downsample\.attention_biases"),
    ),
    Family(
        name="tnt",
        models="timm TNT",
        block=r"blocks\.(?P<block>\d+)\.",
        rows=(
            *(
                row
                for part in ("in", "out")
                for row in (
                    named("qkv", f"attn_{part}.qk", f"attn_{part}.v"),
                    named("proj", f"attn_{part}.proj"),
                )
            ),
            *(named("mlp", f"{mlp}.fc{n}") for mlp in ("mlp_in", "mlp") for n in (1, 2)),
        ),
        block_aux=(r"proj\.weight",),
        aux=(*VIT_AUX, r"pixel_embed\..+", r"(?:patch|pixel)_pos", r"proj\.weight"),
        per_block=({"qkv": 2, "proj": 2, "mlp": 4},),
    ),
    Family(
        name="coat",
        models="timm CoaT",
        block=r"(?P<stage>serial_blocks[1-4]|parallel_blocks)\.(?P<block>\d+)\.",
        stages=(*(f"serial_blocks{n}" for n in range(1, 5)), "parallel_blocks"),
        rows=(
            *(
                named(module, f"factoratt_crpe{n}.{name}")
                for n in ("", "2", "3", "4")
                for module, name in (("qkv", "qkv"), ("proj", "proj"))
            ),
            *FUSED[2:],
            named("mlp", "mlp2.fc1"),
            named("mlp", "mlp2.fc2"),
        ),
        aux=(
            r"cls_token[1-4]",
            r"(?:patch_embed|cpe|crpe)[1-4]\..+",
            r"aggregate\.weight",
            _HEAD,
        ),
        per_block=(_WHOLE, {"qkv": 3, "proj": 3, "mlp": 2}),
    ),
    Family(
        name="visformer",
        models="timm Visformer",
        block=r"stage(?P<stage>[123])\.(?P<block>\d+)\.",
        stages=range(1, 4),
        rows=(
            *_ANY[:2],
            named("mlp", "mlp.conv1", ndims=(4,)),
            named("mlp", "mlp.conv3", ndims=(4,)),
        ),
        block_aux=(r"mlp\.conv2\.weight",),
        aux=(r"pos_embed[123]", r"stem\..+", r"patch_embed[123]\..+", _HEAD),
        per_block=(_WHOLE, _MLP),
    ),
    Family(
        name="volo",
        models="timm VOLO",
        block=r"(?P<stage>network\.\d+|post_network)\.(?P<block>\d+)\.",
        stages=(*(f"network.{n}" for n in range(10)), "post_network"),
        rows=(
            FUSED[0],
            named("qkv", "attn.q", "attn.kv"),
            named("qkv", "attn.v"),  # of the outlook attention, which computes its weights
            *FUSED[1:],
        ),
        block_aux=(r"attn\.attn\.weight",),
        aux=(*VIT_AUX, r"network\.\d+\.proj\.weight", _HEAD),
    ),
    Family(
        name="edgenext",
        models="timm EdgeNeXt",
        block=_BLOCK,
        stage=_STAGE,
        rows=(named("qkv", "xca.qkv"), named("proj", "xca.proj"), *FUSED[2:]),
        block_aux=(
            r"xca\.temperature",
            r"conv_dw\.weight",
            r"convs\.\d+\.weight",
            r"pos_embd\.token_projection\.weight",
        ),
        aux=_AUX,
        per_block=(_WHOLE, _MLP),
    ),
    Family(
        name="nextvit",
        models="timm Next-ViT",
        block=_BLOCK,
        stage=_STAGE,
        rows=(
            named("qkv", "e_mhsa.q", "e_mhsa.k", "e_mhsa.v"),
            named("proj", "e_mhsa.proj"),
            *_ANY[2:],
        ),
        block_aux=(
            r"mhca\.(?:group_conv3x3|projection)\.weight",
            r"(?:patch_embed|projection)\.conv\.weight",
        ),
        aux=_AUX,
        per_block=(_WHOLE, _MLP),
    ),
    Family(
        name="crossvit",
        models="timm CrossViT",
        # a stage has two branches of blocks, and what mixes them
        block=r"blocks\.(?P<stage>\d+)\.(?:blocks|fusion)\.(?P<block>\d+)\.(?:\d+\.)?",
        rows=(FUSED[0], named("qkv", "attn.wq", "attn.wk", "attn.wv"), *FUSED[1:]),
        aux=(
            r"(?:pos_embed|cls_token)_[01]",
            r"patch_embed\..+",
            r"blocks\.\d+\.(?:projs|revert_projs)\..+",
            r"head\.[01]\.weight",
        ),
        per_block=({"qkv": None, "proj": None, "mlp": None},),
    ),
    Family(
        name="segformer",
        models="Hugging Face SegFormer in memory",
        network="segformer",
        block=r"stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
        stage=r"stages\.(?P<stage>\d+)\.",
        rows=HF_MEMORY,
        block_aux=(
            r"attention\.sequence_reduction\.(?:.+\.)?weight",
            r"mlp\.dwconv\.dwconv\.weight",
        ),
        aux=(r"stages\.\d+\.patch_embeddings\..+", r"decode_head\..+", r"classifier\..+"),
    ),
    Family(
        name="segformer_disk",
        models="Hugging Face SegFormer on disk, PVT, GLPN",
        network="segformer",
        block=r"block\.(?P<stage>\d+)\.(?P<block>\d+)\.",
        rows=(
            named("qkv", "attention.self.query", "attention.self.key", "attention.self.value"),
            HF_DENSE[0],
            named("mlp", "mlp.dense1"),
            named("mlp", "mlp.dense2"),
        ),
        block_aux=(
            r"attention\.self\.(?:sr|sequence_reduction)\.weight",
            r"mlp\.dwconv\.dwconv\.weight",
        ),
        aux=(r"patch_embeddings\..+", r"decode_head\..+", r"classifier\..+"),
    ),
)
