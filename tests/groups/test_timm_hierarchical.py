"""timm's hierarchical transformers, built on the meta device: exactly these weights are pruned."""

from __future__ import annotations

import pytest
import torch
from dimap.groups import find_modules, group, shapes_of
from dimap.groups.layers import kind_of

timm = pytest.importorskip("timm")

B = {"qkv": ["attn.qkv"], "proj": ["attn.proj"], "mlp": ["mlp.fc1", "mlp.fc2"]}
STAGED = "stages.*.blocks.*."

# model: its family, and the kinds of prunable layers by module; + joins the tensors of one layer
MODELS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "pvt_v2_b0": ("pvt_v2", {**B, "qkv": ["attn.q+kv"]}),
    "pvt_v2_b2_li": ("pvt_v2", {**B, "qkv": ["attn.q+kv"]}),
    "mvitv2_tiny": ("mvitv2", B),
    "mvitv2_small_cls": ("mvitv2", B),
    "coatnet_0_rw_224": ("coatnet", B),
    "coatnet_rmlp_nano_rw_224": ("coatnet", B),
    "coatnext_nano_rw_224": ("coatnet", B),
    "gcvit_xxtiny": ("gcvit", B),
    "tiny_vit_5m_224": ("tiny_vit", B),
    "efficientformer_l1": (
        "efficientformer",
        {**B, "qkv": ["token_mixer.qkv"], "proj": ["token_mixer.proj"]},
    ),
    "caformer_s18": (
        "efficientformer",
        {**B, "qkv": ["token_mixer.qkv"], "proj": ["token_mixer.proj"]},
    ),
    "efficientformerv2_s0": (
        "efficientformer_v2",
        {
            "qkv": ["token_mixer.q.conv+k.conv+v.conv"],
            "proj": ["token_mixer.proj.conv"],
            "mlp": ["mlp.fc1.conv", "mlp.fc2.conv"],
        },
    ),
    "edgenext_xx_small": ("edgenext", {**B, "qkv": ["xca.qkv"], "proj": ["xca.proj"]}),
    "levit_128s": (
        "levit",
        {
            "qkv": ["attn.qkv.linear"],
            "proj": ["attn.proj.ln.linear"],
            "mlp": ["mlp.ln1.linear", "mlp.ln2.linear"],
        },
    ),
}
OTHERS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "twins_svt_small": (
        "twins",
        {
            "qkv": ["blocks.*.*.attn.q+kv", "blocks.*.*.attn.qkv"],
            "proj": ["blocks.*.*.attn.proj"],
            "mlp": ["blocks.*.*.mlp.fc1", "blocks.*.*.mlp.fc2"],
        },
    ),
    "maxvit_nano_rw_256": (
        "maxvit",
        {
            module: [f"{STAGED}attn_{part}.{n}" for part in ("block", "grid") for n in names]
            for module, names in B.items()
        },
    ),
    "hiera_tiny_224": ("hiera", {m: [f"blocks.*.{n}" for n in names] for m, names in B.items()}),
    "focalnet_tiny_srf": (
        "focalnet",
        {
            "qkv": ["layers.*.blocks.*.modulation.f"],
            "proj": ["layers.*.blocks.*.modulation.h", "layers.*.blocks.*.modulation.proj"],
            "mlp": ["layers.*.blocks.*.mlp.fc1", "layers.*.blocks.*.mlp.fc2"],
        },
    ),
    "davit_tiny": ("davit", {m: [f"{STAGED}*.{n}" for n in names] for m, names in B.items()}),
    "davit_base_fl": (
        "davit",
        {
            m: [f"{STAGED}{part}.{n}" for part in ("channel_block", "spatial_block") for n in names]
            for m, names in B.items()
        },
    ),
    "nest_tiny": (
        "nest",
        {m: [f"levels.*.transformer_encoder.*.{n}" for n in names] for m, names in B.items()},
    ),
    "cait_xxs24_224": (
        "cait",
        {
            "qkv": ["blocks.*.attn.qkv", "blocks_token_only.*.attn.q+k+v"],
            **{
                m: [f"{b}.*.{n}" for b in ("blocks", "blocks_token_only") for n in B[m]]
                for m in ("proj", "mlp")
            },
        },
    ),
    "xcit_nano_12_p16_224": (
        "xcit",
        {
            "qkv": ["blocks.*.attn.qkv", "cls_attn_blocks.*.attn.q+k+v"],
            **{
                m: [f"{b}.*.{n}" for b in ("blocks", "cls_attn_blocks") for n in B[m]]
                for m in ("proj", "mlp")
            },
        },
    ),
    "samvit_base_patch16_224": (
        "vit", {m: [f"blocks.*.{n}" for n in names] for m, names in B.items()}
    ),
    "eva02_tiny_patch14_224": (
        "vit", {m: [f"blocks.*.{n}" for n in names] for m, names in B.items()}
    ),
    "eva02_base_patch14_224": (
        "vit",
        {
            "qkv": ["blocks.*.attn.q_proj+k_proj+v_proj"],
            "proj": ["blocks.*.attn.proj"],
            "mlp": ["blocks.*.mlp.fc1_g+fc1_x", "blocks.*.mlp.fc2"],
        },
    ),
    "swinv2_cr_tiny_224": ("swinv2_cr", {m: [STAGED + n for n in ns] for m, ns in B.items()}),
}  # fmt: skip
OTHERS |= {
    name: (family, {m: [STAGED + n for n in names] for m, names in modules.items()})
    for name, (family, modules) in MODELS.items()
}


def kinds(layers) -> list[str]:
    """Kinds of layers: the first tensor's name, and what differs in the others behind a +."""
    found = set()
    for layer in layers:
        first, *more = (kind_of(name).removesuffix(".weight") for name in layer.parameters)
        parent = first.removesuffix(".conv").rpartition(".")[0] + "."
        found.add("+".join([first, *(name.removeprefix(parent) for name in more)]))
    return sorted(found)


@pytest.mark.parametrize("name", OTHERS)
def test_exactly_these_weights(name):
    family, modules = OTHERS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    found = group(shapes_of(model))
    assert found.families[""].name == family
    assert {m: kinds(ls) for m, ls in found.modules.items() if m != "aux"} == {
        m: sorted(names) for m, names in modules.items()
    }
    # Stages are counted without holes, from the first that has attention or an MLP.
    places = {(ly.stage, ly.block) for ly in found.modules["mlp"]}
    stages = sorted({stage for stage, _ in places if stage is not None})
    assert stages == list(range(stages[0], stages[0] + len(stages))) if stages else True
    assert find_modules(model) == found.modules
    assert not [note for note in found.notes if "outside" in note]
