"""Grouping: each family by committed lists of names and shapes, and by the installed libraries."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dimap import groups
from dimap.families import FAMILIES, Family, Row
from dimap.groups import Layer, choose, find_modules, group, group_names
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "data" / "families"

# Parameters of a block by module; a tuple is one layer.
FUSED = {
    "qkv": ["attn.qkv"],
    "proj": ["attn.proj"],
    "mlp": ["mlp.fc1", "mlp.fc2"],
}
TORCHVISION = {**FUSED, "mlp": ["mlp.0", "mlp.3"]}
HF_MEMORY = {
    "qkv": [("attention.q_proj", "attention.k_proj", "attention.v_proj")],
    "proj": ["attention.o_proj"],
    "mlp": ["mlp.fc1", "mlp.fc2"],
}
HF_DISK = {
    "qkv": [("attention.self.query", "attention.self.key", "attention.self.value")],
    "proj": ["attention.output.dense"],
    "mlp": ["intermediate.dense", "output.dense"],
}
HF_VIT_DISK = {
    **HF_DISK,
    "qkv": [tuple(f"attention.attention.{x}" for x in ("query", "key", "value"))],
}
HF_QKV = {
    "attention.q_proj": "attention.qkv",
    "attention.self.query": "attention.self.qkv",
    "attention.attention.query": "attention.attention.qkv",
}

# case: (beginning of a block's names, the block, blocks of each stage or of the whole model)
SMALL = (1, 1, 11, 1)
EXPECTED: dict[str, tuple[str, dict, tuple[int, ...] | int]] = {
    "timm_swin_tiny": ("layers.{stage}.blocks.{block}", FUSED, (2, 2, 6, 2)),
    "timm_swin_s3": ("layers.{stage}.blocks.{block}", FUSED, SMALL),
    "timm_swinv2": ("layers.{stage}.blocks.{block}", FUSED, SMALL),
    "timm_swinv2_cr": ("stages.{stage}.blocks.{block}", FUSED, SMALL),
    "timm_vit": ("blocks.{block}", FUSED, 11),
    "timm_deit_distilled": ("blocks.{block}", FUSED, 11),
    "timm_deit3": ("blocks.{block}", FUSED, 2),
    "timm_beit": ("blocks.{block}", FUSED, 2),
    "torchvision_swin": ("features.{odd}.{block}", TORCHVISION, SMALL),
    "torchvision_swin_v2": ("features.{odd}.{block}", TORCHVISION, SMALL),
    "torchvision_vit": (
        "encoder.layers.encoder_layer_{block}",
        {
            "qkv": ["self_attention.in_proj_weight"],
            "proj": ["self_attention.out_proj"],
            "mlp": ["mlp.0", "mlp.3"],
        },
        11,
    ),
    "hf_swin": ("swin.encoder.layers.{stage}.blocks.{block}", HF_MEMORY, SMALL),
    "hf_swin_disk": ("swin.encoder.layers.{stage}.blocks.{block}", HF_DISK, SMALL),
    "hf_swinv2": ("swinv2.encoder.layers.{stage}.blocks.{block}", HF_DISK, SMALL),
    "hf_swinv2_disk": ("swinv2.encoder.layers.{stage}.blocks.{block}", HF_DISK, SMALL),
    "hf_vit": ("vit.layers.{block}", HF_MEMORY, 11),
    "hf_vit_disk": ("vit.encoder.layer.{block}", HF_VIT_DISK, 11),
    "hf_deit": ("deit.layers.{block}", HF_MEMORY, 11),
    "hf_deit_disk": ("deit.encoder.layer.{block}", HF_VIT_DISK, 11),
    "hf_beit": ("beit.layers.{block}", HF_MEMORY, 11),
    "hf_beit_disk": ("beit.encoder.layer.{block}", HF_VIT_DISK, 11),
    "microsoft_swin_tiny": ("layers.{stage}.blocks.{block}", FUSED, (2, 2, 6, 2)),
}


def expected(case: str) -> dict[str, list[Layer]]:
    """The prunable layers of a case, in order of depth."""
    template, parts, depths = EXPECTED[case]
    stages = [(None, depths)] if isinstance(depths, int) else list(enumerate(depths))
    modules: dict[str, list[Layer]] = {module: [] for module in parts}
    for stage, depth in stages:
        for block in range(depth):
            odd = None if stage is None else 2 * stage + 1
            start = template.format(stage=stage, odd=odd, block=block)
            for module, layers in parts.items():
                for layer in layers:
                    names = (layer,) if isinstance(layer, str) else layer
                    name = f"{start}.{HF_QKV.get(names[0], names[0])}"
                    parameters = tuple(
                        f"{start}.{x}" + (".weight" if not x.endswith("_weight") else "")
                        for x in names
                    )
                    modules[module].append(Layer(name, module, parameters, stage, block))
    return modules


def load(case: str) -> dict:
    return json.loads((FOLDER / f"{case}.json").read_text())


def tensors(case: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in load(case)["tensors"].items()}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families_generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(case: str, content: dict) -> None:
    modules = group_names(content["tensors"])
    aux = modules.pop("aux")
    assert modules == expected(case)
    pruned = {name for layers in modules.values() for ly in layers for name in ly.parameters}
    kept = [n for n in content["tensors"] if n not in pruned and n not in content["buffers"]]
    assert [ly.parameters for ly in aux] == [(name,) for name in kept]
    assert {ly.module for ly in aux} == {"aux"}


def sizes(modules: dict[str, list[Layer]], shapes: dict[str, tuple[int, ...]]) -> list:
    return [
        (ly.module, ly.stage, ly.block, sum(prod(shapes[name]) for name in ly.parameters))
        for module in ("qkv", "proj", "mlp")
        for ly in modules[module]
    ]


@pytest.mark.parametrize("case", EXPECTED)
def test_family_by_committed_list(case):
    check(case, load(case))


@pytest.mark.parametrize("case", EXPECTED)
def test_family_by_installed_library(case):
    for library in ("timm", "torchvision", "transformers", "safetensors"):
        if case.startswith(library) or (library != "timm" and case.startswith("hf")):
            pytest.importorskip(library)
    if case.startswith("microsoft"):
        pytest.importorskip("timm")
    content = generator().CASES[case]()
    in_memory = case.startswith("hf") and not case.endswith("_disk")
    if in_memory and int(content["library"].split()[1].partition(".")[0]) < 5:
        pytest.skip("before Transformers 5 the names in memory are those on disk")
    check(case, content)


def test_every_case_is_listed_and_small():
    files = {path.stem: path.stat().st_size for path in FOLDER.glob("*.json")}
    assert set(files) == set(EXPECTED)
    assert max(files.values()) < 60_000


@pytest.mark.parametrize("case", EXPECTED)
def test_order_of_the_mapping_does_not_matter(case):
    shapes = tensors(case)
    modules = group_names(shapes)
    del modules["aux"]
    for names in (sorted(shapes), list(reversed(shapes))):
        again = group_names({name: shapes[name] for name in names})
        del again["aux"]
        assert again == modules


@pytest.mark.parametrize("case", [case for case in EXPECTED if not case.endswith("_disk")])
def test_order_is_that_of_the_parameters(case):
    shapes = list(tensors(case))
    for layers in group_names(tensors(case)).values():
        places = [shapes.index(name) for ly in layers for name in ly.parameters]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("timm_swin_s3", "hf_swin"),
        ("timm_swin_s3", "torchvision_swin"),
        ("hf_swin", "hf_swin_disk"),
        ("timm_swinv2", "hf_swinv2"),
        ("hf_vit", "hf_vit_disk"),
        ("timm_swin_tiny", "microsoft_swin_tiny"),
    ],
)
def test_same_network_under_other_names_has_same_layers(left, right):
    a, b = tensors(left), tensors(right)
    assert sizes(group_names(a), a) == sizes(group_names(b), b)


def test_fused_and_split_give_the_same_weights_in_the_same_order():
    shapes = tensors("timm_swin_s3")
    fused = {n: torch.arange(prod(s)).view(s) + i * 1e6 for i, (n, s) in enumerate(shapes.items())}
    rename = {
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    split: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        if not re.fullmatch(
            r"layers\.\d+\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.weight", name
        ):
            continue
        for old, new in rename.items():
            name = name.replace(old, new)
        if "qkv" in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split["encoder." + name.replace("attn.qkv", f"attention.self.{part}")] = rows
        else:
            split["encoder." + name] = tensor
    split = dict(sorted(split.items()))  # as safetensors does

    def flat(state: dict[str, Tensor], module: str) -> Tensor:
        layers = find_modules(state)[module]
        return torch.cat([state[name].flatten() for ly in layers for name in ly.parameters])

    for module in ("qkv", "proj", "mlp"):
        assert torch.equal(flat(fused, module), flat(split, module))


@pytest.mark.parametrize(
    ("name", "pruned", "total"),
    [
        ("swin_tiny_patch4_window7_224", 25_878_528, 28_288_354),
        ("swin_small_patch4_window7_224", 47_112_192, 49_606_258),
        ("swin_base_patch4_window7_224", 83_755_008, 87_768_224),
    ],
)
def test_counts_of_the_paper(name, pruned, total):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    modules = find_modules(model)
    assert sum(size for *_, size in sizes(modules, shapes)) == pruned
    assert sum(prod(shapes[n]) for ls in modules.values() for ly in ls for n in ly.parameters) == (
        total
    )


def test_counts_of_the_paper_from_the_list():
    shapes = tensors("timm_swin_tiny")
    assert sum(size for *_, size in sizes(group_names(shapes), shapes)) == 25_878_528


# Wrapped models and state dicts


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "model."],
)
@pytest.mark.parametrize("case", ["timm_swin_s3", "hf_swin_disk", "torchvision_vit"])
def test_prefix(case, prefix):
    shapes = tensors(case)
    modules = group_names({prefix + name: shape for name, shape in shapes.items()})
    assert modules == {
        module: [
            Layer(
                prefix + ly.name,
                ly.module,
                tuple(prefix + name for name in ly.parameters),
                ly.stage,
                ly.block,
            )
            for ly in layers
        ]
        for module, layers in group_names(shapes).items()
    }


def test_backbone_with_a_head_outside():
    shapes = {
        name if name.startswith("head") else "backbone." + name: shape
        for name, shape in tensors("timm_swin_s3").items()
    }
    assert len(group_names(shapes)["qkv"]) == sum(SMALL)


def test_blocks_compiled_one_by_one():
    shapes = {
        re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): shape
        for name, shape in tensors("hf_swin").items()
    }
    layer = group_names(shapes)["qkv"][1]
    assert layer.name == "swin.encoder.layers.1.blocks.0._orig_mod.attention.qkv"
    assert layer.parameters[0].endswith("layers.1.blocks.0._orig_mod.attention.q_proj.weight")


def test_names_of_timm_features_only():
    shapes = tensors("timm_swin_s3")
    renamed = {re.sub(r"layers\.(\d)", r"layers_\1", name): s for name, s in shapes.items()}
    assert sizes(group_names(renamed), renamed) == sizes(group_names(shapes), shapes)


def block(module: nn.Module) -> nn.Module:
    """A model of one ViT block with a buffer, as parameters on the meta device."""
    with torch.device("meta"):
        attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
        attn.register_buffer("relative_position_index", torch.zeros(4, 4, dtype=torch.int64))
        mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        module.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn, "mlp": mlp})])
    return module


def test_module_and_its_state_dict_agree():
    model = block(nn.Module())
    modules = find_modules(model)
    assert modules["qkv"] == [
        Layer("blocks.0.attn.qkv", "qkv", ("blocks.0.attn.qkv.weight",), None, 0)
    ]
    assert find_modules(model.state_dict()) == modules
    assert find_modules(torch.compile(model))["qkv"][0].name == "_orig_mod.blocks.0.attn.qkv"


def test_state_dict_leaves_out_buffers_and_whole_numbers():
    state = block(nn.Module()).state_dict()
    state["blocks.0.attn_mask"] = torch.zeros(2, 4, 4)
    state["blocks.0.steps"] = torch.zeros(2, 2, dtype=torch.int32)
    listed = {name for ls in find_modules(state).values() for ly in ls for name in ly.parameters}
    assert listed == {name for name in state if name.endswith((".weight", ".bias"))}


def test_quantised_weight_is_listed_not_dropped():
    state = block(nn.Module()).state_dict()
    name = "blocks.0.attn.qkv.weight"
    state[name] = state[name].to(torch.int8)
    assert find_modules(state)["qkv"][0].parameters == (name,)


def test_parameter_shared_by_two_names_is_listed_once():
    model = block(nn.Module())
    model.head = model.blocks[0]["attn"]["proj"]
    assert "head.weight" not in [ly.parameters[0] for ly in find_modules(model)["aux"]]


def test_aux_in_a_block_knows_its_place():
    aux = {ly.parameters[0]: ly for ly in group_names(tensors("timm_swin_s3"))["aux"]}
    norm = aux["layers.2.blocks.10.norm1.weight"]
    assert (norm.name, norm.stage, norm.block) == ("layers.2.blocks.10.norm1", 2, 10)
    merge = aux["layers.1.downsample.reduction.weight"]
    assert (merge.stage, merge.block) == (1, None)
    head = aux["head.fc.bias"]
    assert (head.name, head.stage, head.block) == ("head.fc.bias", None, None)


# Models that are no family


@pytest.mark.parametrize(
    ("extra", "shape"),
    [
        ("layers.0.blocks.0.attn.qkv.lora_A.weight", (2, 8)),
        ("layers.0.blocks.0.adapter.fc1.weight", (2, 8)),
        ("layers.0.blocks.0.attn.qkv.weight_g", (24, 1)),
    ],
)
def test_unknown_weight_is_named(extra, shape):
    shapes = {**tensors("timm_swin_s3"), extra: shape}
    with pytest.raises(ValueError, match=re.escape(f"unknown weight {extra} {shape}")):
        group_names(shapes)


@pytest.mark.parametrize(
    ("extra", "shape"),
    [
        ("prompt", (1, 5, 8)),
        ("ahead.weight", (10, 64)),
        ("neck.lateral_convs.0.conv.weight", (8, 64, 1, 1)),
        ("decoder.layers.0.blocks.0.attn.qkv.weight", (24, 8)),
    ],
)
def test_unknown_weight_outside_the_blocks_is_aux_with_a_note(extra, shape):
    shapes = tensors("timm_swin_s3")
    found = group({**shapes, extra: shape})
    assert found.modules["aux"][-1].parameters == (extra,)
    assert {m: ls for m, ls in found.modules.items() if m != "aux"} == expected("timm_swin_s3")
    (note,) = found.notes
    assert "never pruned, being outside the blocks of swin: 1 tensors" in note
    assert extra.split(".")[0] in note
    assert group(shapes).notes == ()


def test_unknown_vector_is_aux():
    shapes = {**tensors("timm_swin_s3"), "layers.0.blocks.0.gate": (8,)}
    assert (
        Layer("layers.0.blocks.0.gate", "aux", ("layers.0.blocks.0.gate",), 0, 0)
        in (group_names(shapes)["aux"])
    )


@pytest.mark.parametrize(
    ("case", "gone", "message"),
    [
        (
            "timm_swin_s3",
            "layers.2.blocks.3.mlp.fc2.weight",
            "block 3 of stage 2 must have 2 mlp layer(s), got 1",
        ),
        ("timm_vit", "blocks.0.attn.qkv.weight", "block 0 must have 1 qkv layer(s), got 0"),
        ("hf_vit", "vit.layers.3.attention.k_proj.weight", "a layer must have a tensor for"),
    ],
)
def test_incomplete_block_is_named(case, gone, message):
    shapes = tensors(case)
    del shapes[gone]
    with pytest.raises(ValueError, match=re.escape(message)):
        group_names(shapes)


def test_convolution_in_place_of_a_matrix():
    shapes = {**tensors("timm_vit"), "blocks.0.attn.qkv.weight": (72, 24, 1, 1)}
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got blocks\.0\.attn\.qkv"):
        group_names(shapes)


def test_two_networks_are_two_towers():
    shapes = tensors("timm_vit")
    both = {p + name: shape for p in ("text.", "vision.") for name, shape in shapes.items()}
    modules = group_names(both)
    assert list(modules) == [
        *(f"{tower}.{module}" for tower in ("text", "vision") for module in ("qkv", "proj", "mlp")),
        "aux",
    ]
    assert {layer.tower for layer in modules["text.qkv"]} == {"text"}
    assert [layer.block for layer in modules["vision.qkv"]] == list(range(11))


def test_unknown_model_is_described():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *(nn.Linear(8, 8),) * 3)
    model.append(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="known family") as error:
        find_modules(model)
    text = str(error.value)
    assert "It has 8 parameters, 3 of two or more dimensions" in text
    assert text.index("--pattern") < text.index("3 x *.weight")  # what to do comes first
    assert "1 x *.weight" not in text
    assert "3 x *.weight (8, 3, 3, 3)" in text
    assert "patterns={" in text
    assert "--pattern 'all=" in text
    assert "--family transformer" not in text  # it would be refused as well


def _gptq() -> dict[str, tuple[int, ...]]:
    """What a GPTQ checkpoint has of floating point."""
    shapes = {
        f"model.layers.{i}.{x}_proj.scales": (4, 64) for i in range(2) for x in ("mlp.up", "a.q")
    }
    return {"model.embed_tokens.weight": (100, 64), **shapes}


def _beside(ending: str) -> dict[str, tuple[int, ...]]:
    return {**tensors("timm_vit"), f"blocks.0.attn.qkv.{ending}": (1, 1)}


@pytest.mark.parametrize(
    "shapes",
    [_gptq(), _beside("weight_scale"), _beside("weight_scale_inv"), _beside("qweight")],
    ids=["GPTQ", "compressed-tensors", "fp8", "packed"],
)
def test_quantized_models_are_told_to_be_dequantized(shapes):
    with pytest.raises(ValueError, match=r"quantized weights: dequantize it first") as error:
        group_names(shapes)
    assert "pattern" not in str(error.value)


def test_scales_beside_a_weight_are_a_parameter_of_its_layer():
    shapes = {"blocks.0.w.weight": (8, 8), "blocks.0.w.scales": (8, 8)}
    with pytest.raises(ValueError, match="--pattern 'all=blocks") as error:
        group_names(shapes)
    assert "quantized" not in str(error.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (0,)},
        {"x": (0, 4)},
        {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "blocks.0.norm1.weight": (8,)},
        {"patch_embed.proj.weight": (192, 3, 16, 16), "cls_token": (1, 1, 192)},  # linears in int8
        {"tok_embeddings.weight": (100, 8), "head.weight": (100, 8)},
    ],
    ids=lambda shapes: next(iter(shapes)),
)
def test_no_pattern_is_shown_where_nothing_can_be_pruned(shapes):
    with pytest.raises(ValueError, match="looks like a matrix that can be pruned") as error:
        group_names(shapes)
    assert "pattern" not in str(error.value)
    assert "convolutional" not in str(error.value)


@pytest.mark.parametrize("name", ["a+b.0.w$", "x[0].3.{w}", "(f).(g)|h.1.weight", "w^", "a?\\.2.w"])
def test_the_pattern_that_is_shown_matches(name):
    with pytest.raises(ValueError, match="patterns=") as error:
        group_names({name: (8, 8)})
    shown = re.search(r"patterns=(\{.*\})", str(error.value))
    assert shown is not None
    modules = group_names({name: (8, 8)}, ast.literal_eval(shown[1]))
    assert modules["all"][0].parameters == (name,)


def test_a_convolutional_network_is_called_so():
    shapes = {f"layer{i}.{j}.conv1.weight": (8, 8, 3, 3) for i in range(4) for j in range(2)}
    with pytest.raises(ValueError, match="looks like a convolutional network") as error:
        group_names(shapes | {"fc.weight": (10, 8)})
    assert "--pattern 'all=layer0" in str(error.value)
    for other in (tensors("timm_vit") | {"blocks.0.extra": (2, 2)}, {"blocks.0.w.weight": (8, 8)}):
        with pytest.raises(ValueError, match="known family") as error:
            group_names(other)
        assert "convolutional" not in str(error.value)


def test_hint_of_the_error_works():
    shapes = {**tensors("timm_vit"), "blocks.0.extra": (2, 2)}
    with pytest.raises(ValueError, match="patterns=") as error:
        group_names(shapes)
    hint = re.search(r"patterns=(\{.*\})", str(error.value))
    assert hint is not None
    modules = group_names(shapes, ast.literal_eval(hint[1]))
    assert [len(layers) for layers in modules.values()] == [11, 11, 22, len(shapes) - 44]
    ignore = re.search(r"--ignore '(.*)'", str(error.value))
    assert ignore is not None
    found = group(shapes, choose(ignore=ignore[1]))
    assert [len(layers) for layers in found.modules.values()] == [11, 11, 22, len(shapes) - 44]
    assert "never pruned" in found.notes[0]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ([1], TypeError, "must be an nn.Module or a mapping of names to tensors, got list"),
        ({"model": {}}, TypeError, "must hold tensors only, got dict under 'model'"),
        ({"fc1._packed_params.dtype": torch.qint8}, TypeError, "dequantize the model first"),
        ({}, ValueError, "must have at least one parameter of floating point"),
        (nn.ReLU(), ValueError, "must have at least one parameter"),
    ],
)
def test_what_is_no_model(model, error, message):
    with pytest.raises(error, match=re.escape(message)):
        find_modules(model)


# The caller's own patterns

OWN = {
    "layers.10.q.weight": (4, 4),
    "layers.10.k.weight": (4, 4),
    "layers.2.q.weight": (4, 4),
    "layers.2.k.weight": (4, 4),
    "layers.2.out.weight": (4, 4),
    "layers.10.out.weight": (4, 4),
    "layers.2.out.bias": (4,),
}


def test_own_patterns():
    modules = group_names(
        OWN,
        {
            "qk": [(r"layers\.(?P<block>\d+)\.q\.weight", r"layers\.(?P<block>\d+)\.k\.weight")],
            "out": r"layers\.\d+\.out\.weight",
        },
    )
    assert modules == {
        "qk": [
            Layer("layers.2.q+k", "qk", ("layers.2.q.weight", "layers.2.k.weight"), None, 2),
            Layer("layers.10.q+k", "qk", ("layers.10.q.weight", "layers.10.k.weight"), None, 10),
        ],
        "out": [
            Layer("layers.2.out", "out", ("layers.2.out.weight",)),
            Layer("layers.10.out", "out", ("layers.10.out.weight",)),
        ],
        "aux": [Layer("layers.2.out.bias", "aux", ("layers.2.out.bias",))],
    }


def test_own_patterns_first_match_wins():
    modules = group_names(OWN, {"ten": r"layers\.10\..*weight", "rest": r".*weight"})
    assert [len(layers) for layers in modules.values()] == [3, 3, 1]


def test_own_patterns_match_whole_names():
    with pytest.raises(ValueError, match="must match a parameter"):
        group_names(OWN, {"out": r"out\.weight"})


def test_own_patterns_on_a_module():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    modules = find_modules(model, patterns={"all": r"\d\.weight"})
    assert [ly.name for ly in modules["all"]] == ["0", "1"]
    assert [ly.name for ly in modules["aux"]] == ["0.bias", "1.bias"]


Q, K = r"layers\.\d+\.q\.weight", r"layers\.\d+\.k\.weight"


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ([Q], TypeError, "patterns must be a mapping of module names to regexes, got list"),
        ({}, ValueError, "patterns must name at least one module, got {}"),
        ({"aux": Q}, ValueError, "not 'aux', got 'aux'"),
        ({"": Q}, ValueError, "not empty"),
        ({1: Q}, ValueError, "must be a string, not empty, not 'aux', got 1"),
        ({"q": 3}, TypeError, "patterns['q'] must be a regex or a list of them"),
        ({"q": (Q, K)}, TypeError, "is a tuple inside the list"),
        ({"q": []}, ValueError, "patterns['q'] must hold at least one regex, got []"),
        ({"q": [()]}, TypeError, "must hold regexes as strings, got ()"),
        ({"q": [Q, 3]}, TypeError, "must hold regexes as strings, got 3"),
        ({"q": "("}, ValueError, "patterns['q'] must hold valid regexes, got '(': missing )"),
        (
            {"q": [Q, "nothing"]},
            ValueError,
            "got none for 'nothing' among:\n  2 x layers.*.q.weight",
        ),
        ({"a": Q, "b": Q}, ValueError, "patterns['b'] must match a parameter that no earlier"),
        ({"q": r".*"}, ValueError, "two or more dimensions, got layers.2.out.bias (4,)"),
        ({"q": r"layers\.\d+\.(?P<block>.)\.weight"}, ValueError, "must capture a number, got 'q'"),
        ({"qk": [(Q, K)]}, ValueError, "layers.10.q.weight and layers.2.q.weight for"),
        (
            {"qk": [(Q.replace(r"\d+", r"(\d+)"), r"layers\.(2)\.k\.weight")]},
            ValueError,
            r"a layer must have a tensor for layers\.(2)\.k\.weight, got only layers.10.q.weight",
        ),
    ],
)
def test_own_patterns_that_are_wrong(patterns, error, message):
    with pytest.raises(error, match=re.escape(message)):
        group_names(OWN, patterns)


# The table


def test_names_of_families_are_unique():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("case", EXPECTED)
def test_other_families_that_fit_give_the_same_layers(case):
    """Tables overlap where one has what may be in a block and another has not."""
    shapes = tensors(case)
    layers = {m: ls for m, ls in group_names(shapes).items() if m != "aux"}
    for family in FAMILIES:
        try:
            other = group_names(shapes, choose(family=family.name))
        except ValueError:
            continue
        assert {m: ls for m, ls in other.items() if m != "aux"} == layers


def test_family_of_new_rows(monkeypatch):
    """q with kv or a fused qkv, a gated MLP, a convolution: rows alone describe them."""
    family = Family(
        name="new",
        models="a new family",
        block=r"blocks\.(?P<stage>\d+)\.(?P<block>\d+)\.",
        rows=(
            Row("qkv", (r"attn\.qkv\.weight",)),
            Row("qkv", (r"attn\.q\.weight", r"attn\.kv\.weight")),
            Row("proj", (r"attn\.proj\.conv\.weight",), ndims=(4,)),
            Row("mlp", (r"mlp\.fc1_g\.weight", r"mlp\.fc1_x\.weight"), name="fc1"),
            Row("mlp", (r"mlp\.fc2\.weight",)),
        ),
        block_aux=(r"attn\.sr\.weight",),
        stages=range(2, 9),
    )
    monkeypatch.setattr(groups, "FAMILIES", (family,))
    shapes: dict[str, tuple[int, ...]] = {}
    for start, attn in (("blocks.3.0.", ("kv", "sr", "q")), ("blocks.2.0.", ("qkv",))):
        shapes |= {f"{start}attn.{x}.weight": (4, 4) for x in attn}
        shapes[start + "attn.proj.conv.weight"] = (4, 4, 1, 1)
        shapes |= {f"{start}mlp.{x}.weight": (4, 4) for x in ("fc2", "fc1_x", "fc1_g")}
    modules = group_names(shapes)
    assert modules["qkv"] == [
        Layer("blocks.2.0.attn.qkv", "qkv", ("blocks.2.0.attn.qkv.weight",), 0, 0),
        Layer(
            "blocks.3.0.attn.qkv",
            "qkv",
            ("blocks.3.0.attn.q.weight", "blocks.3.0.attn.kv.weight"),
            1,
            0,
        ),
    ]
    assert [ly.name for ly in modules["mlp"]] == [
        "blocks.2.0.mlp.fc1",
        "blocks.2.0.mlp.fc2",
        "blocks.3.0.mlp.fc1",
        "blocks.3.0.mlp.fc2",
    ]
    assert modules["mlp"][0].parameters == (
        "blocks.2.0.mlp.fc1_g.weight",
        "blocks.2.0.mlp.fc1_x.weight",
    )
    assert [ly.name for ly in modules["aux"]] == ["blocks.3.0.attn.sr"]
