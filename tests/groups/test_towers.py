"""Several towers, any prefix, what stands beside a backbone, and models of language by their names."""

from __future__ import annotations

import re

import dimap
import pytest
import torch
from dimap.families import FAMILIES
from dimap.groups import choose, group
from test_groups import expected, tensors

Shapes = dict[str, tuple[int, ...]]
PREFIXES = [
    "net.", "1.", "encoder.", "visual.trunk.", "backbone.bottom_up.", "backbone.0.", "sed_model.",
    "audio_branch.", "teacher.backbone.", "module.backbone.body.", "a.b.c.d.",
]  # fmt: skip


def prunable(modules):
    return {module: layers for module, layers in modules.items() if module != "aux"}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("case", ["timm_swin_s3", "timm_vit", "hf_swin_disk", "torchvision_swin"])
def test_any_prefix(case, prefix):
    found = group({prefix + name: shape for name, shape in tensors(case).items()})
    want = expected(case)
    assert {m: [ly.name for ly in ls] for m, ls in prunable(found.modules).items()} == {
        m: [prefix + ly.name for ly in ls] for m, ls in want.items()
    }
    assert found.notes == ()


BESIDE: dict[str, Shapes] = {
    "a pyramid of mmdetection": {
        "neck.lateral_convs.0.conv.weight": (8, 64, 1, 1),
        "bbox_head.fc.weight": (9, 8),
    },
    "Mask2Former's decoders": {
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.value_proj.weight": (8, 8),
        **{
            f"sem_seg_head.predictor.transformer_decoder.layers.{i}.{name}.weight": (8, 8)
            for i in range(2)
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                         "self_attn.out_proj", "fc1", "fc2", "cross_attn.q_proj")
        },
    },
    "SwinUNETR's decoder": {
        "encoder1.layer.conv1.conv.weight": (8, 3, 3, 3, 3),
        "decoder5.transp_conv.conv.weight": (8, 8, 2, 2, 2),
        "out.conv.conv.weight": (2, 8, 1, 1, 1),
    },
    "SwinIR's convolutions": {
        "conv_first.weight": (8, 3, 3, 3),
        "layers.0.conv.weight": (8, 8, 3, 3),
        "upsample.0.weight": (32, 8, 3, 3),
    },
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_stands_beside_a_backbone_is_kept_with_a_note(beside, prefix):
    shapes = {prefix + name: shape for name, shape in tensors("timm_swin_s3").items()}
    alone = group(shapes)
    found = group({**shapes, **beside})
    assert prunable(found.modules) == prunable(alone.modules)
    assert {ly.parameters[0] for ly in found.modules["aux"]} >= beside.keys()
    assert "never pruned, being outside the blocks" in found.notes[0]
    first = next(iter(beside)).split(".")[0]
    assert first in found.notes[0]


def mm(name: str) -> str:
    name = re.sub(r"^layers\.(\d+)", r"stages.\1", name)
    for old, new in (
        ("attn.", "attn.w_msa."),
        ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"),
        ("patch_embed.proj", "patch_embed.projection"),
    ):
        name = name.replace(old, new)  # fmt: skip
    return "backbone." + name


def monai(name: str) -> str:
    name = re.sub(r"^layers\.(\d)", lambda m: f"layers{int(m[1]) + 1}.0", name)
    return "swinViT." + name.replace("mlp.fc", "mlp.linear")


def swinir(name: str) -> str:
    return re.sub(r"^layers\.(\d+)\.blocks", r"layers.\1.residual_group.blocks", name)


@pytest.mark.parametrize("rename", [mm, monai, swinir])
def test_swin_as_others_name_it(rename):
    shapes = {n: s for n, s in tensors("timm_swin_s3").items() if not n.startswith("head")}
    found = group({rename(name): shape for name, shape in shapes.items()})
    assert found.families[""].network == "swin"
    assert {
        m: [(ly.stage, ly.block, tuple(map(rename, ly.parameters))) for ly in ls]
        for m, ls in expected("timm_swin_s3").items()
    } == {
        m: [(ly.stage, ly.block, ly.parameters) for ly in ls]
        for m, ls in prunable(found.modules).items()
    }


# Models of language and their like: names of a block, as Transformers gives them in memory.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
SELF = tuple(f"attention.self.{x}" for x in ("query", "key", "value"))
T5 = tuple(f"layer.0.SelfAttention.{x}" for x in "qkv")
NAMES: dict[str, tuple[str, dict[str, list]]] = {
    "llama": ("model.layers.{}.", {"qkv": [QKV], "proj": ["self_attn.o_proj"], "mlp": [*GATED]}),
    "phi3": (
        "model.layers.{}.",
        {
            "qkv": ["self_attn.qkv_proj"],
            "proj": ["self_attn.o_proj"],
            "mlp": ["mlp.gate_up_proj", "mlp.down_proj"],
        },
    ),
    "phi": (
        "model.layers.{}.",
        {"qkv": [QKV], "proj": ["self_attn.dense"], "mlp": ["mlp.fc1", "mlp.fc2"]},
    ),
    "gpt2": (
        "transformer.h.{}.",
        {"qkv": ["attn.c_attn"], "proj": ["attn.c_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"]},
    ),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        {
            "qkv": ["attention.query_key_value"],
            "proj": ["attention.dense"],
            "mlp": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        },
    ),
    "opt": (
        "model.decoder.layers.{}.",
        {"qkv": [QKV], "proj": ["self_attn.out_proj"], "mlp": ["fc1", "fc2"]},
    ),
    "bert": (
        "bert.encoder.layer.{}.",
        {
            "qkv": [SELF],
            "proj": ["attention.output.dense"],
            "mlp": ["intermediate.dense", "output.dense"],
        },
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}.",
        {
            "qkv": [("attention.q_lin", "attention.k_lin", "attention.v_lin")],
            "proj": ["attention.out_lin"],
            "mlp": ["ffn.lin1", "ffn.lin2"],
        },
    ),
    "t5": (
        "encoder.block.{}.",
        {
            "qkv": [T5],
            "proj": ["layer.0.SelfAttention.o"],
            "mlp": [
                ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
                "layer.1.DenseReluDense.wo",
            ],
        },
    ),
    "dinov2": (
        "encoder.layer.{}.",
        {
            "qkv": [tuple(f"attention.{x}_proj" for x in "qkv")],
            "proj": ["attention.o_proj"],
            "mlp": ["mlp.fc1", "mlp.fc2"],
        },
    ),
}


def build(case: str, prefix: str = "", blocks: int = 11) -> Shapes:
    start, modules = NAMES[case]
    shapes: Shapes = {f"{prefix}model.embed_tokens.weight": (32, 8)}
    for block in range(blocks):
        for layers in modules.values():
            for layer in layers:
                for name in (layer,) if isinstance(layer, str) else layer:
                    shapes[f"{prefix}{start.format(block)}{name}.weight"] = (8, 8)
        shapes[f"{prefix}{start.format(block)}norm.weight"] = (8,)
    return shapes


def wanted(case: str, prefix: str = "", blocks: int = 11) -> dict[str, list]:
    start, modules = NAMES[case]
    return {
        module: [
            (block, tuple(f"{prefix}{start.format(block)}{n}.weight" for n in names))
            for block in range(blocks)
            for layer in layers
            for names in [(layer,) if isinstance(layer, str) else layer]
        ]
        for module, layers in modules.items()
    }


def found_in(modules) -> dict[str, list]:
    return {
        module: [(ly.block, ly.parameters) for ly in layers]
        for module, layers in modules.items()
        if module != "aux"
    }


DECODERS = ("llama", "phi3", "phi", "gpt2", "gpt_neox", "opt")  # which lose much by magnitude


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("prefix", ["", "module.", "base.7."])
def test_known_by_its_names(case, prefix):
    shapes = build(case, prefix)
    found = group(dict(sorted(shapes.items())))
    assert found_in(found.modules) == wanted(case, prefix)
    assert found.costly == (case in DECODERS)
    assert not any("language models" in note for note in found.notes)


@pytest.mark.parametrize("case", NAMES)
def test_roles_of_the_words_give_the_same_layers(case):
    """But for T5, whose sublayers are numbered: the number before the part is taken for the block."""
    shapes = build(case)
    found = group(shapes, choose(family="transformer"))
    if case == "t5":
        assert {m: len(ls) for m, ls in found.modules.items() if m != "aux"} == {
            m: len(ls) for m, ls in wanted(case).items()
        }
        return
    assert found_in(found.modules) == wanted(case)
    assert "grouped by the words of the names" in found.notes[0]
    assert "qkv: 11 x" in found.notes[0]


def clip() -> Shapes:
    shapes: Shapes = {"logit_scale": (), "visual_projection.weight": (8, 8)}
    for tower, blocks in (("text_model", 2), ("vision_model", 3)):
        for block in range(blocks):
            for name in (*QKV, "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
                shapes[f"{tower}.encoder.layers.{block}.{name}.weight"] = (8, 8)
    return shapes


@pytest.mark.parametrize("family", [None, "transformer"])
def test_two_towers_are_ranked_apart(family):
    modules = dimap.find_modules({n: torch.empty(s) for n, s in clip().items()}, family=family)
    assert {m: len(ls) for m, ls in prunable(modules).items()} == {
        "text_model.qkv": 2, "text_model.proj": 2, "text_model.mlp": 4,
        "vision_model.qkv": 3, "vision_model.proj": 3, "vision_model.mlp": 6,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * (9 if "text" in name else 1)
        for name, shape in clip().items()
    }
    masks = dimap.select(state, 0.5, family=family)
    for tower in ("text_model", "vision_model"):
        kept = sum(int(m.sum()) for n, m in masks.items() if n.startswith(tower) and "fc" in n)
        total = sum(m.numel() for n, m in masks.items() if n.startswith(tower) and "fc" in n)
        assert kept == total // 2
    pruning = dimap.prune(state, 0.5, scope="block", family=family)
    assert {"text_model block 0", "vision_model block 0", "vision_model block 2"} < set(
        pruning.thresholds
    )


def test_a_tower_with_something_unknown_is_an_error_beside_one_that_is_known():
    shapes = clip() | {"text_model.encoder.layers.1.adapter.down.weight": (2, 8)}
    with pytest.raises(ValueError, match=r"unknown weight text_model\.encoder\.layers\.1\.adapter"):
        group(shapes)
    found = group(shapes, choose(ignore=r".*\.adapter\..*"))
    assert len(found.modules["text_model.mlp"]) == 4
    assert "ignored, thus never pruned" in found.notes[-1]


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.router", "mlp.experts.router", "mixer.in_proj",
                                  "norm.proj", "embed.proj", "self_attn.rotary"])  # fmt: skip
def test_routers_norms_and_state_spaces_have_no_role(name):
    shapes = build("llama")
    for block in range(11):
        shapes[f"model.layers.{block}.{name}.weight"] = (4, 8)
        if name.startswith("mixer"):
            shapes[f"model.layers.{block}.mixer.A_log"] = (4, 8)
    found = group(shapes, choose(family="transformer"))
    assert found_in(found.modules) == wanted("llama")


def test_state_space_layers_beside_attention_are_kept():
    shapes = build("llama", blocks=4)
    for block in range(4, 8):
        start = f"model.layers.{block}."
        shapes |= {f"{start}mlp.{x}_proj.weight": (8, 8) for x in ("gate", "up", "down")}
        shapes |= {f"{start}linear_attn.{x}.weight": (8, 8) for x in ("q_proj", "out_proj")}
        shapes[f"{start}linear_attn.conv1d.weight"] = (8, 1, 4)
    for family in (None, "transformer"):
        modules = group(shapes, choose(family=family)).modules
        assert {m: len(ls) for m, ls in prunable(modules).items()} == {
            "qkv": 4, "proj": 4, "mlp": 16,
        }  # fmt: skip


def test_too_little_is_refused_and_told():
    shapes = build("llama") | {
        f"model.layers.{b}.self_attn.strange{i}.weight": (64, 64) for b in range(11) for i in (1, 2)
    }
    with pytest.raises(ValueError, match=r"must find the roles of 90 %") as error:
        group(shapes, choose(family="transformer"))
    text = str(error.value)
    assert "qkv: 11 x model.layers.*.self_attn.q_proj.weight + " in text
    assert "11 x model.layers.*.self_attn.strange1.weight (64, 64)" in text
    ignore = re.search(r"--ignore '(.*)'", text)
    assert ignore is not None
    left = choose(
        family="transformer", ignore=[ignore[1], ignore[1].replace("strange1", "strange2")]
    )
    assert found_in(group(shapes, left).modules) == wanted("llama")


def test_no_attention_no_transformer():
    shapes = {f"layers.{i}.mlp.fc{j}.weight": (8, 8) for i in range(4) for j in (1, 2)}
    with pytest.raises(ValueError, match=r"got 0\.0 %"):
        group(shapes, choose(family="transformer"))


# What the caller says


def test_family_alone():
    shapes = build("llama")
    assert group(shapes, choose(family="llama")).modules == group(shapes).modules
    with pytest.raises(ValueError, match="must be of the family swin"):
        group(shapes, choose(family="swin"))
    with pytest.raises(ValueError, match="got 'lama'; near it are llama"):
        choose(family="lama")
    with pytest.raises(ValueError, match="patterns or family must be given, not both"):
        choose({"all": ".*"}, "swin")
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_ignored_layers_are_aux_with_a_note():
    shapes = tensors("timm_swin_s3")
    found = group(shapes, choose(ignore=[r"layers\.0\..*", r"layers\.2\.blocks\.3\.attn\.qkv"]))
    want = {
        m: [ly for ly in ls if ly.stage != 0 and ly.name != "layers.2.blocks.3.attn.qkv"]
        for m, ls in expected("timm_swin_s3").items()
    }
    assert prunable(found.modules) == want
    assert len(found.notes) == 2
    assert [ly.parameters[0] for ly in found.modules["aux"]] == [
        name for name in shapes
        if name not in {p for ls in want.values() for ly in ls for p in ly.parameters}
        and "index" not in name
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--ignore.* got none for 'nothing'"):
        group(shapes, choose(ignore="nothing"))
    with pytest.raises(ValueError, match=r"valid regexes, got '\('"):
        group(shapes, choose(ignore="("))


def test_one_of_split_projections_ignored_takes_its_layer_along():
    modules = group(tensors("hf_vit"), choose(ignore=r".*\.3\.attention\.k_proj\.weight")).modules
    assert [ly.block for ly in modules["qkv"]] == [0, 1, 2, *range(4, 11)]


def test_a_group_of_parts_makes_one_layer():
    shapes = build("llama", blocks=3)
    patterns = {"qkv": r".*layers\.(?P<block>\d+)\.self_attn\.(?P<part>q|k|v)_proj\.weight"}
    assert (
        found_in(group(shapes, choose(patterns)).modules)["qkv"]
        == (wanted("llama", blocks=3)["qkv"])
    )


def test_every_call_takes_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(s, generator=generator) for n, s in build("llama", blocks=2).items()}
    options = {"family": "transformer", "ignore": r".*layers\.1\.mlp.*"}
    masks = dimap.select(state, 0.5, **options)
    assert len(masks) == 2 * 4 + 3
    assert dimap.score(state, **options).keys() == masks.keys()
    assert dimap.prune(dict(state), 0.5, **options).masks.keys() == masks.keys()


def test_a_share_of_a_module_is_of_every_tower(tmp_path):
    from dimap.checkpoint.prune import prune_checkpoint
    from safetensors.torch import save_file

    save_file({n: torch.randn(s) for n, s in clip().items()}, tmp_path / "in.safetensors")
    pruned = prune_checkpoint(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        0.5,
        shares={"qkv": 0.25, "text_model.qkv": 0.75},
    )
    assert pruned.sparsity["vision_model.qkv"] == 0.25
    assert pruned.sparsity["text_model.qkv"] == 0.75
    assert pruned.sparsity["text_model.mlp"] == 0.5


def test_the_base_of_a_peft_model():
    """Adapters are named by `ignore`; masks of the plain model fit the base below them."""
    from dimap.masks import fit_masks

    plain = build("llama", blocks=2)
    shapes = {
        "base_model.model." + name.replace("q_proj.weight", "q_proj.base_layer.weight"): shape
        for name, shape in plain.items()
    }
    for block in range(2):
        for part, shape in (("A", (2, 8)), ("B", (8, 2))):
            start = f"base_model.model.model.layers.{block}.self_attn.q_proj"
            shapes[f"{start}.lora_{part}.default.weight"] = shape
    with pytest.raises(ValueError, match=r"unknown weight \S+lora_A"):
        group(shapes)
    modules = group(shapes, choose(ignore=r".*\.lora_[AB]\..*")).modules
    assert [ly.block for ly in modules["qkv"]] == [0, 1]
    masks = dimap.select({n: torch.randn(s) for n, s in plain.items()}, 0.5)
    fitted = fit_masks(masks, {n: torch.empty(s) for n, s in shapes.items()})
    assert len(fitted) == len(masks)
    assert "base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight" in fitted


STYLES = {
    "vit-pytorch": ("transformer.layers.{}.", ["0.to_qkv", "0.to_out.0", "1.net.1", "1.net.4"]),
    "diffusers": (
        "transformer_blocks.{}.",
        ["attn1.to_q+attn1.to_k+attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"],
    ),
    "torch": (
        "encoder.layers.{}.",
        ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"],
    ),
    "Baichuan": (
        "model.layers.{}.",
        ["self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj+mlp.up_proj", "mlp.down_proj"],
    ),
    "InternLM2": (
        "model.layers.{}.",
        ["attention.wqkv", "attention.wo", "feed_forward.w1+feed_forward.w3", "feed_forward.w2"],
    ),
    "ChatGLM": (
        "transformer.encoder.layers.{}.",
        ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
         "mlp.dense_4h_to_h"],
    ),
    "Qwen 1": (
        "transformer.h.{}.", ["attn.c_attn", "attn.c_proj", "mlp.w1+mlp.w3", "mlp.c_proj"]
    ),
    "XLM": ("attentions.{}.", ["q_lin+k_lin+v_lin", "out_lin"]),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_roles_in_the_words_of_others(style):
    start, layers = STYLES[style]
    shapes: Shapes = {"patch_embedding.weight": (8, 12), "head.weight": (4, 8)}
    want: dict[str, list] = {}
    for block in range(3):
        for number, layer in enumerate(layers):
            names = tuple(
                f"{start.format(block)}{n}" + ("" if n.endswith("_weight") else ".weight")
                for n in layer.split("+")
            )
            shapes |= dict.fromkeys(names, (8, 8))
            want.setdefault(("qkv", "proj", "mlp", "mlp")[number], []).append(names)
    modules = group(dict(sorted(shapes.items())), choose(family="transformer")).modules
    assert {m: [ly.parameters for ly in ls] for m, ls in prunable(modules).items()} == want
