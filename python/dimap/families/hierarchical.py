"""Hierarchical vision transformers of timm: stages of different width, hybrids, class attention."""

from __future__ import annotations

from .swin import HEAD, HF_DISK, HF_MEMORY, PATCH_EMBED
from .table import family
from .vit import VIT_AUX

_BLOCK = "stages[._]<stage>.blocks.<block>."
_HEAD = "(head|head_dist|aux_head)..weight"
_STEM = "(stem|patch_embed)..weight"
_AUX = f"{_STEM} stages[._]*.downsample..weight {_HEAD} (cls_token|pos_embed)"
_WHOLE = (1, 1, 2)
_NONE = (0, 0, 0)  # a block of convolutions
_MLP = (0, 0, 2)

_CONVOLUTIONS = "mlp.fc1:24 mlp.fc2:24"  # an MLP of 1 x 1 convolutions, or of matrices
_TABLE = "rel_pos.relative_position_bias_table"
_POS = rf"{_TABLE} rel_pos.mlp.fc[12].weight"
_CONV = (
    "conv[123]_(1x1|kxk|dw).weight conv_dw.weight se(_early)?.fc[12].weight shortcut.expand.weight"
)


def _within(prefix: str, names: str) -> str:
    return " ".join(prefix + name for name in names.split())


FAMILIES = (
    family(
        "pvt_v2: timm PVTv2",
        _BLOCK,
        qkv="attn.{q,kv}",
        block_aux="attn.sr.weight mlp.dwconv.weight",
        aux=_AUX,
    ),
    family(
        "twins: timm Twins (PCPVT, SVT)",
        "blocks.<stage>.<block>.",
        qkv="attn.qkv attn.{q,kv}",
        block_aux="attn.sr.weight",
        aux=f"patch_embeds.*.proj.weight pos_block.*.proj.*.weight {HEAD}",
    ),
    family(
        "mvitv2: timm MViTv2",
        _BLOCK,
        block_aux="attn.pool_[qkv].weight attn.rel_pos_[hw] shortcut_proj_(attn|mlp).weight",
        aux=_AUX,
    ),
    family(
        "coatnet: timm CoAtNet, CoAtNeXt",
        _BLOCK,
        qkv="attn.qkv:24",
        proj="attn.proj:24",
        mlp=_CONVOLUTIONS,
        mark="conv(1_1x1|_dw).weight",
        block_aux=f"{_within('attn.', _POS)} {_CONV}",
        aux=_AUX,
        per_block=[_WHOLE, _NONE, _MLP],
    ),
    family(
        "maxvit: timm MaxViT, MaxxViT",
        _BLOCK,
        qkv="attn_block.attn.qkv attn_grid.attn.qkv attn.attn_block.qkv attn.attn_grid.qkv",
        proj="attn_block.attn.proj attn_grid.attn.proj attn.attn_block.proj attn.attn_grid.proj",
        mlp="attn_block.mlp.fc1 attn_block.mlp.fc2 attn_grid.mlp.fc1 attn_grid.mlp.fc2 "
        "attn.mlp.fc1 attn.mlp.fc2",
        block_aux=f"{_within('attn_(block|grid).attn.', _POS)} attn.attn_(block|grid).{_TABLE} "
        + _within(r"conv.(*.)?", f"{_CONV} mlp.fc[12].weight"),
        aux=_AUX,
        per_block=[
            (2, 2, 4),
            (2, 2, 2),  # block and grid side by side, with one MLP
            (1, 1, 2),  # grid alone
        ],
    ),
    family(
        "hiera: timm Hiera, SAM 2's HieraDet",
        "blocks.<block>.",
        block_aux="proj.weight",
        mark="proj.weight",
        aux=VIT_AUX,
    ),
    family(
        "focalnet: timm FocalNet",
        "layers[._]<stage>.blocks.<block>.",
        qkv="modulation.f:24",
        proj="modulation.h:24 modulation.proj:24",
        mlp=_CONVOLUTIONS,
        block_aux="modulation.focal_layers.*.*.weight",
        aux=f"{_STEM} layers[._]*.downsample.proj.weight {_HEAD}",
        per_block=[(1, 2, 2)],
    ),
    family(
        "efficientformer: timm EfficientFormer, CAFormer, FastViT with attention",
        _BLOCK,
        qkv="token_mixer.qkv",
        proj="token_mixer.proj",
        mlp=_CONVOLUTIONS,
        block_aux="token_mixer.attention_biases token_mixer.(pwconv[12]|dwconv).weight "
        "token_mixer.(norm|mixer)..weight mlp.conv.conv.weight "
        "(token_mixer.)?layer_scale(_[12])?.gamma",
        aux=f"{_AUX} stages[._]*.pos_emb... final_conv...",
        per_block=[_WHOLE, _MLP],
    ),
    family(
        "efficientformer_v2: timm EfficientFormerV2",
        _BLOCK,
        qkv="token_mixer.{q,k,v}.conv:24",
        proj="token_mixer.proj.conv:24",
        mlp="mlp.fc1.conv:24 mlp.fc2.conv:24",
        block_aux="token_mixer.attention_biases token_mixer.(stride_conv|v_local).conv.weight "
        "token_mixer.talking_head[12].weight mlp.mid.conv.weight",
        aux=f"{_AUX} stages[._]*.downsample.attn.attention_biases",
        per_block=[_WHOLE, _MLP],
    ),
    family(
        "davit: timm DaViT, Florence-2's vision tower",
        # a spatial block and a channel block, or only one of them, in turn
        rf"{_BLOCK}(\d|spatial_block|channel_block).",
        block_aux="cpe[12].proj.weight",
        aux=_AUX,
        per_block=[(2, 2, 4), _WHOLE],
    ),
    family(
        "nest: timm NesT",
        "levels.<stage>.transformer_encoder.<block>.",
        aux=f"{PATCH_EMBED} levels.*.pos_embed levels.*.pool.conv.weight {HEAD}",
    ),
    family(
        "gcvit: timm GCViT",
        _BLOCK,
        block_aux=f"attn.{_TABLE}",
        aux=f"{_AUX} stages[._]*.global_block...",
    ),
    family(
        "cait: timm CaiT",
        "<stage:blocks|blocks_token_only>.<block>.",
        qkv="attn.qkv attn.{q,k,v}",
        stages=("blocks", "blocks_token_only"),
        block_aux="attn.proj_[lw].weight",
        mark="attn.q.weight",
        aux=VIT_AUX,
    ),
    family(
        "xcit: timm XCiT",
        "<stage:blocks|cls_attn_blocks>.<block>.",
        qkv="attn.qkv attn.{q,k,v}",
        stages=("blocks", "cls_attn_blocks"),
        mark="attn.temperature",
        block_aux="attn.temperature local_mp.conv[12].weight",
        aux=f"{VIT_AUX} pos_embed.token_projection.weight",
    ),
    family(
        "tiny_vit: timm TinyViT",
        _BLOCK,
        block_aux="attn.attention_biases local_conv.conv.weight conv[123].conv.weight",
        aux=_AUX,
        per_block=[_WHOLE, _NONE],
    ),
    family(
        "pit: timm PiT",
        "transformers.<stage>.blocks.<block>.",
        aux=f"{_AUX} transformers.*.pool..weight",
    ),
    family(
        "convit: timm ConViT",
        "blocks.<block>.",
        qkv="attn.qkv attn.{qk,v}",
        block_aux="attn.pos_proj.weight",
        aux=VIT_AUX,
    ),
    family(
        "levit: timm LeViT",
        _BLOCK,
        qkv="attn.qkv.linear:24",
        proj="attn.proj.ln.linear:24",
        mlp="mlp.ln1.linear:24 mlp.ln2.linear:24",
        block_aux="attn.attention_biases",
        aux=f"{_AUX} stages[._]*.downsample.attn_downsample.attention_biases",
    ),
    family(
        "tnt: timm TNT",
        "blocks.<block>.",
        qkv="attn_in.{qk,v} attn_out.{qk,v}",
        proj="attn_in.proj attn_out.proj",
        mlp="mlp_in.fc1 mlp_in.fc2 mlp.fc1 mlp.fc2",
        block_aux="proj.weight",
        aux=f"{VIT_AUX} pixel_embed... (patch|pixel)_pos proj.weight",
        per_block=[(2, 2, 4)],
    ),
    family(
        "coat: timm CoaT",
        "<stage:serial_blocks[1-4]|parallel_blocks>.<block>.",
        qkv="factoratt_crpe.qkv factoratt_crpe2.qkv factoratt_crpe3.qkv factoratt_crpe4.qkv",
        proj="factoratt_crpe.proj factoratt_crpe2.proj factoratt_crpe3.proj factoratt_crpe4.proj",
        mlp="mlp.fc1 mlp.fc2 mlp2.fc1 mlp2.fc2",
        stages=(*(f"serial_blocks{n}" for n in range(1, 5)), "parallel_blocks"),
        aux=f"cls_token[1-4] (patch_embed|cpe|crpe)[1-4]... aggregate.weight {_HEAD}",
        per_block=[_WHOLE, (3, 3, 2)],
    ),
    family(
        "visformer: timm Visformer",
        "stage<stage:[123]>.<block>.",
        qkv="attn.qkv:24",
        proj="attn.proj:24",
        mlp="mlp.conv1:4 mlp.conv3:4",
        stages=range(1, 4),
        block_aux="mlp.conv2.weight",
        aux=f"pos_embed[123] stem... patch_embed[123]... {_HEAD}",
        per_block=[_WHOLE, _MLP],
    ),
    family(
        "volo: timm VOLO",
        "<stage:network.*|post_network>.<block>.",
        # attn.v alone is of the outlook attention, which computes its weights
        qkv="attn.qkv attn.{q,kv} attn.v",
        stages=(*(f"network.{n}" for n in range(10)), "post_network"),
        block_aux="attn.attn.weight",
        aux=f"{VIT_AUX} network.*.proj.weight {_HEAD}",
    ),
    family(
        "edgenext: timm EdgeNeXt",
        _BLOCK,
        qkv="xca.qkv",
        proj="xca.proj",
        block_aux="xca.temperature conv_dw.weight convs.*.weight pos_embd.token_projection.weight",
        aux=_AUX,
        per_block=[_WHOLE, _MLP],
    ),
    family(
        "nextvit: timm Next-ViT",
        _BLOCK,
        qkv="e_mhsa.{q,k,v}",
        proj="e_mhsa.proj",
        mlp=_CONVOLUTIONS,
        block_aux="mhca.(group_conv3x3|projection).weight (patch_embed|projection).conv.weight",
        aux=_AUX,
        per_block=[_WHOLE, _MLP],
    ),
    family(
        "crossvit: timm CrossViT",
        # a stage has two branches of blocks, and what mixes them
        "blocks.<stage>.(blocks|fusion).<block>.(*.)?",
        qkv="attn.qkv attn.{wq,wk,wv}",
        aux="(pos_embed|cls_token)_[01] patch_embed... blocks.*.(projs|revert_projs)... "
        "head.[01].weight",
        per_block=[(None, None, None)],
    ),
    family(
        "segformer: Hugging Face SegFormer in memory",
        "stages.<stage>.blocks.<block>.",
        *HF_MEMORY,
        network="segformer",
        block_aux="attention.sequence_reduction..weight mlp.dwconv.dwconv.weight",
        aux="stages.*.patch_embeddings... decode_head... classifier...",
    ),
    family(
        "segformer_disk: Hugging Face SegFormer on disk, PVT, GLPN",
        "block.<stage>.<block>.",
        *HF_DISK[:2],
        "mlp.dense1 mlp.dense2",
        network="segformer",
        block_aux="attention.self.(sr|sequence_reduction).weight mlp.dwconv.dwconv.weight",
        aux="patch_embeddings... decode_head... classifier...",
    ),
)
