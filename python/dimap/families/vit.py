"""Plain vision transformers: blocks of one width, one after the other."""

from __future__ import annotations

from .swin import BIAS_TABLE, HEAD, HF_AUX, HF_DISK, HF_MEMORY, PATCH_EMBED
from .table import family

VIT_AUX = (
    "(cls|dist|reg|mask)_token pos_embed(_win|_window)? rope.freqs embeds... attn_pool... "
    "shared_rel_pos.relative_position_bias_table shared_rel_pos.mlp.fc[12].weight "
    f"(merger|aligner)... neck.*.weight pre_logits.fc.weight {PATCH_EMBED} {HEAD}"
)
_REL_POS = (
    f"{BIAS_TABLE} attn.rel_pos.relative_position_bias_table attn.rel_pos.mlp.fc[12].weight "
    "attn.rel_pos_[hw]"
)
_HF_AUX = (
    f"{HF_AUX} embeddings.register_tokens "
    # of BEiT: shared by its blocks; and of its masked image modelling
    "(shared_position_bias|encoder.relative_position_bias).relative_position_bias_table "
    "lm_head.weight"
)

FAMILIES = (
    family(
        "vit: timm ViT, DeiT (also distilled), DeiT3, BEiT, EVA, EVA02, DINOv2, DINOv3, SigLIP,"
        " SAM",
        "blocks.<block>.",
        qkv="attn.qkv attn.{q,k,v}_proj",
        mlp="mlp.fc1 mlp.{fc1_g,fc1_x}=fc1 mlp.{w0,w1}=w01 mlp.fc2 mlp.w2 mlp.w12 mlp.w3 "
        "mlp.lin1 mlp.linear_fc1 mlp.lin2 mlp.linear_fc2 "
        "mlp.{gate,up}_proj=gate_up_proj mlp.down_proj",
        network="vit",
        block_aux=_REL_POS,
        aux=VIT_AUX,
    ),
    family(
        "vit_parallel: timm ViT with parallel blocks (18x2)",
        "blocks.<block>.",
        qkv="attns.*.attn.qkv",
        proj="attns.*.attn.proj",
        mlp="ffns.*.mlp.fc1 ffns.*.mlp.fc2",
        aux=VIT_AUX,
        per_block=[(2, 2, 4)],
    ),
    family(
        "gemma_vit: the vision tower of Gemma 4, in timm and Hugging Face",
        "(blocks|layers).<block>.",
        qkv="(self_)?attn.{q,k,v}_proj.linear",
        proj="(self_)?attn.o_proj.linear",
        mlp="mlp.{gate,up}_proj.linear=gate_up_proj mlp.down_proj.linear",
        aux="patch_embed... patch_embedder...",
    ),
    family(
        "hf_sam: Hugging Face SAM, SAM-HQ, ViTDet",
        "layers?.<block>.",
        qkv="(attn|attention).qkv",
        proj="(attn|attention).proj",
        mlp="mlp.(lin1|fc1) mlp.(lin2|fc2)",
        network="vit",
        block_aux="(attn|attention).rel_pos_[hw]",
        aux="patch_embed... pos_embed neck... embeddings...",
    ),
    family(
        "torchvision_vit: torchvision ViT",
        "encoder.layers.encoder_layer_<block>.",
        qkv="self_attention.in_proj_weight",
        proj="self_attention.out_proj",
        mlp="mlp.(0|linear_1) mlp.(3|linear_2)",
        network="vit",
        aux="class_token encoder.pos_embedding conv_proj..weight heads..weight",
    ),
    family(
        "hf_vit: Hugging Face ViT, DeiT, BEiT, DINOv2 in memory, DINOv3",
        "layers?.<block>.",
        *HF_MEMORY[:2],
        "mlp.fc1 mlp.{gate?,up}_proj=gate_up_proj mlp.weights_in "
        "mlp.fc2 mlp.down_proj mlp.weights_out",
        network="vit",
        block_aux="(attention.)?relative_position_bias.relative_position_bias_table",
        aux=_HF_AUX,
    ),
    family(
        "hf_vit_disk: Hugging Face ViT, DeiT, BEiT, DINOv2 on disk and before Transformers 5",
        "encoder.layer.<block>.",
        qkv="attention.attention.{query,key,value}",
        proj=HF_DISK[1],
        mlp="intermediate.dense mlp.fc1 mlp.weights_in output.dense mlp.fc2 mlp.weights_out",
        network="vit",
        block_aux="attention.attention.relative_position_bias.relative_position_bias_table",
        aux=_HF_AUX,
    ),
)
