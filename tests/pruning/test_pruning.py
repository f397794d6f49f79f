"""score, select and prune of whole models."""

from __future__ import annotations

import subprocess
import sys

import dimap
import pytest
import torch
from dimap import reference
from torch import nn


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})


PATTERNS = {
    "qkv": r"blocks\.(?P<block>\d+)\.attn\.qkv\.weight",
    "proj": r"blocks\.(?P<block>\d+)\.attn\.proj\.weight",
    "mlp": r"blocks\.(?P<block>\d+)\.mlp\.fc[12]\.weight",
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    m = nn.Module()
    m.blocks = nn.ModuleList(Block(16) for _ in range(3))
    m.head = nn.Linear(16, 4)
    for i, p in enumerate(m.parameters()):
        p.data *= 1 + i % 5
    return m


def by_hand(model: nn.Module, sparsity: dict[str, float], scope: str, normalize: str = "layer"):
    modules = dimap.find_modules(model, PATTERNS)
    names, layers, scopes = [], [], []
    for module, members in modules.items():
        for layer in members if module != "aux" else []:
            names += layer.parameters
            layers.append(
                {"layer": layer.name, "block": (module, layer.block), "module": module}[normalize]
            )
            scopes.append({"module": module, "global": "all", "layer": layer.name}[scope])
    weights = [model.get_parameter(n).detach() for n in names]
    number = {s: i for i, s in enumerate(dict.fromkeys(scopes))}
    ratio = {
        s: next((r for m, r in sparsity.items() if s == m or m in s), next(iter(sparsity.values())))
        for s in number
    }
    keep = []
    for s in number:
        n = sum(w.numel() for w, mine in zip(weights, scopes, strict=True) if mine == s)
        keep.append(n - round(ratio[s] * n))
    groups = {g: i for i, g in enumerate(dict.fromkeys(layers))}
    masks = reference.select(
        weights, [groups[g] for g in layers], [number[s] for s in scopes], keep
    )
    return dict(zip(names, masks, strict=True))


@pytest.mark.parametrize("scope", ["module", "global", "layer"])
def test_select_follows_the_specification(model: nn.Module, scope: str) -> None:
    got = dimap.select(model, 0.55, scope=scope, patterns=PATTERNS)
    want = by_hand(model, {"": 0.55}, scope)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize(
    ("normalize", "scope"), [("block", "module"), ("module", "global"), ("module", "module")]
)
def test_normalize(model: nn.Module, normalize: str, scope: str) -> None:
    got = dimap.select(model, 0.4, scope=scope, normalize=normalize, patterns=PATTERNS)
    want = by_hand(model, {"": 0.4}, scope, normalize)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_normalize_over_the_module_ranks_by_magnitude(model: nn.Module) -> None:
    masks = dimap.select(model, 0.5, normalize="module", patterns=PATTERNS)
    kept = torch.cat(
        [model.get_parameter(n).detach().abs()[m] for n, m in masks.items() if "mlp" in n]
    )
    dropped = torch.cat(
        [model.get_parameter(n).detach().abs()[~m] for n, m in masks.items() if "mlp" in n]
    )
    assert kept.min() >= dropped.max()


def test_a_ratio_for_each_module(model: nn.Module) -> None:
    ratios = {"qkv": 0.25, "proj": 0.0, "mlp": 1.0}
    masks = dimap.select(model, ratios, patterns=PATTERNS)
    for module, ratio in ratios.items():
        mine = [m for n, m in masks.items() if (module if module != "mlp" else "fc") in n]
        total, kept = sum(m.numel() for m in mine), sum(int(m.sum()) for m in mine)
        assert kept == total - round(ratio * total)


def test_prune_is_select_in_place(model: nn.Module) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = dimap.select(model, 0.55, patterns=PATTERNS)
    pruning = dimap.prune(model, 0.55, patterns=PATTERNS)
    scores = dimap.score({n: before[n] for n in before}, patterns=PATTERNS)
    for n, p in model.named_parameters():
        want = torch.where(masks[n], before[n], torch.zeros(())) if n in masks else before[n]
        assert torch.equal(p, want)
    assert all(torch.equal(pruning.masks[n], masks[n]) for n in masks)
    for module, layers in pruning.modules.items():
        if module == "aux":
            continue
        kept = torch.cat([scores[n][masks[n]] for x in layers for n in x.parameters])
        assert pruning.thresholds[module] == pytest.approx(float(kept.min()), rel=1e-6)
    weights = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == pytest.approx(0.45 * weights, abs=2)
    assert pruning.sparsity == {"qkv": 0.55, "proj": 0.55, "mlp": 0.55}


def test_a_state_dict_is_pruned_in_place_too(model: nn.Module) -> None:
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruning = dimap.prune(state, 0.5, patterns=PATTERNS)
    for n, mask in pruning.masks.items():
        assert not state[n][~mask].any()
    masks = dimap.select(model, 0.5, patterns=PATTERNS)
    assert all(torch.equal(pruning.masks[n], masks[n]) for n in masks)


def test_thresholds_by_scope(model: nn.Module) -> None:
    assert dimap.prune(model, 0.1, scope="global", patterns=PATTERNS).thresholds.keys() == {
        "global"
    }
    names = dimap.prune(model, 0.1, scope="layer", patterns=PATTERNS).thresholds.keys()
    assert "blocks.0.attn.qkv" in names
    assert len(names) == 12


def test_non_contiguous_parameters(model: nn.Module) -> None:
    twin = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: (p.t().contiguous().t() if p.ndim == 2 else p) for n, p in twin.items()}
    got, want = (
        dimap.prune(state, 0.5, patterns=PATTERNS),
        dimap.prune(twin, 0.5, patterns=PATTERNS),
    )
    for n, mask in want.masks.items():
        assert torch.equal(got.masks[n], mask)
        assert torch.equal(state[n], twin[n])


def test_shares_in_percent(model: nn.Module) -> None:
    for text, share in (
        ({"sparsity": "55%"}, {"sparsity": 0.55}),
        ({"params": " 60 %", "min_keep": "7%"}, {"params": 0.6, "min_keep": 0.07}),
        ({"sparsity": "50%", "limits": {"mlp": ["30%", 1]}}, {"sparsity": 0.5, "limits": {"mlp": (0.3, 1)}}),
    ):  # fmt: skip
        found, wanted = (dimap.select(model, patterns=PATTERNS, **given) for given in (text, share))
        assert all(torch.equal(mask, wanted[name]) for name, mask in found.items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.2}, ValueError, r"sparsity must be in \[0, 1\], got 1.2"),
        ({"sparsity": float("nan")}, ValueError, r"sparsity must be in \[0, 1\], got nan"),
        ({"sparsity": "half"}, ValueError, "sparsity must be a share as 0.6 or 60%, got 'half'"),
        ({"sparsity": 55}, ValueError, r"sparsity must be in \[0, 1\], got 55: 55 % is 0.55"),
        ({"sparsity": "155%"}, ValueError, r"sparsity must be in \[0, 1\], got 155%$"),
        ({}, TypeError, "sparsity as 0.5 or '50%', or nm as '2:4', or a budget as flops=0.6, got none"),
        ({"sparsity": True}, TypeError, "sparsity must be a number, got bool"),
        ({"sparsity": {"qkv": 0.5}}, ValueError, r"one number for each of the modules qkv, proj, mlp \(0 keeps a module as it is\), got qkv"),
        ({"sparsity": {"qkv": -1, "proj": 0, "mlp": 0}}, ValueError, r"sparsity\['qkv'\] must be in \[0, 1\], got -1"),
        ({"sparsity": {"qkv": 0, "proj": 0, "mlp": 0}, "scope": "global"}, ValueError, "one number where a scope holds several modules"),
        ({"sparsity": 0.5, "scope": "head"}, ValueError, "scope must be one of module, global, layer, type, block, stage, row, got 'head'"),
        ({"sparsity": 0.5, "normalize": "x"}, ValueError, "normalize must be one of layer, block, stage, module"),
    ],
)  # fmt: skip
def test_bad_arguments_change_nothing(model: nn.Module, arguments, error, message) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        dimap.prune(model, patterns=PATTERNS, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: p.fill_(float("nan")),
            r"blocks\.1\.mlp\.fc1\.weight must be finite, got nan at flat index 0",
        ),
        (
            lambda p: p.double(),
            r"blocks\.1\.mlp\.fc1\.weight must be float32, bfloat16 or float16, got float64",
        ),
        (lambda p: p.to("meta"), r"blocks\.1\.mlp\.fc1\.weight must"),
    ],
)
def test_bad_weights_are_named_and_nothing_is_changed(model: nn.Module, spoil, message) -> None:
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    state["blocks.1.mlp.fc1.weight"] = spoil(state["blocks.1.mlp.fc1.weight"])
    before = {n: t.clone() for n, t in state.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        dimap.prune(state, 0.5, patterns=PATTERNS)
    others = [n for n in state if n != "blocks.1.mlp.fc1.weight"]
    assert all(torch.equal(state[n], before[n]) for n in others)


def test_nothing_to_prune(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no known family|does not|patterns"):
        dimap.prune(nn.Linear(3, 3), 0.5)


def test_import_brings_torch_alone() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import dimap; new = set(sys.modules) - before;"
        "print(sorted(m.split('.')[0] for m in new))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "typer",
        "rich",
        "click",
        "safetensors",
        "timm",
        "torchvision",
        "transformers",
        "matplotlib",
    }
    assert not heavy & set(eval(run.stdout))


def test_build_info() -> None:
    info = dimap.build_info()
    assert info["version"] == dimap.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["torch_target"] == "2.10"
