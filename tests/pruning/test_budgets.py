"""Budgets and limits: exact by a walk over all weights in order, and the smallest sparsity that there is."""

from __future__ import annotations

import dimap
import pytest
import torch
from dimap import _C, ops, reference
from dimap.budgets import STEPS, Budgets
from dimap.report import build_report
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, problems
from torch import nn

USUAL = {"first": 0x33800000, "last": 0x437FFFFF}


@st.composite
def limited(draw: st.DrawFn) -> tuple[Problem, list[int], list[int], list[tuple[int, int]]]:
    """A problem whose layers are divided into sets with limits, and `keep` within these."""
    problem = draw(problems())
    sets, layer_of = [], []
    for layer in problem.layers:
        if layer in layer_of and draw(st.booleans()):
            sets.append(len(layer_of) - 1 - layer_of[::-1].index(layer))
        else:
            sets.append(len(layer_of))
            layer_of.append(layer)
    limits = []
    for number in range(len(layer_of)):
        size = sum(w.numel() for w, s in zip(problem.weights, sets, strict=True) if s == number)
        least = draw(st.sampled_from([0, 0, size // 3, size]))
        limits.append((least, draw(st.sampled_from([size, size, (least + size) // 2, least]))))
    module_of = dict(zip(sets, problem.modules, strict=True))
    for module, keep in enumerate(problem.keep):
        mine = [limits[s] for s, m in module_of.items() if m == module]
        problem.keep[module] = min(max(keep, sum(a for a, _ in mine)), sum(b for _, b in mine))
    return problem, sets, layer_of, limits


def look(counts: _C.Counts, weights, bins: int) -> None:
    numbers, windows = counts.windows()
    views = torch.frombuffer(bytearray(windows), dtype=torch.int64).reshape(-1, 7)
    table = ops.survey([weights[i] for i in numbers], list(range(len(numbers))), views, bins)
    counts.take(table.numpy())


@settings(max_examples=100, deadline=None)
@given(limited(), st.sampled_from([256, 1000, 4096]))
def test_counts_enclose_what_a_walk_keeps_and_close_in_on_it(case, bins) -> None:
    problem, sets, layer_of, limits = case
    layers = max(problem.layers, default=-1) + 1
    if not problem.weights or len(set(problem.modules)) < len(problem.keep):
        return
    modules, bits = [0] * layers, [16] * layers
    for w, layer, module in zip(problem.weights, problem.layers, problem.modules, strict=True):
        modules[layer], bits[layer] = module, min(bits[layer], ops.DTYPES[w.dtype].zero_bits)
    counts = _C.Counts(
        [(s, w.numel()) for s, w in zip(sets, problem.weights, strict=True)],
        [(layer, *pair) for layer, pair in zip(layer_of, limits, strict=True)],
        modules,
        bits,
        bins=bins,
        **USUAL,
    )
    masks = reference.select_limited(
        problem.weights, problem.layers, problem.modules, problem.keep, sets, limits
    )
    parts = [int(mask.sum()) for mask in masks]
    nonzero = [int((m & (w != 0)).sum()) for m, w in zip(masks, problem.weights, strict=True)]
    wanted = [0] * len(limits)
    for number, kept in zip(sets, parts, strict=True):
        wanted[number] += kept
    for _ in range(12):
        look(counts, problem.weights, bins)
        found = counts.kept(problem.keep)
        for bounds, exact in zip(found[:3], (wanted, parts, nonzero), strict=True):
            assert all(a <= x <= b for (a, b), x in zip(bounds, exact, strict=True))
        if not counts.close_in(problem.keep, problem.keep):
            break
    assert [pair for pair in found[0]] == [(n, n) for n in wanted]


class Net(nn.Module):
    """Two blocks of qkv, proj and mlp on tokens of an image; the second sees a quarter of them."""

    def __init__(self, seed: int, dtype: torch.dtype, zeros: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict() for _ in range(2))
        for i, block in enumerate(self.blocks):
            for name, shape in (
                ("qkv", (48, 16)),
                ("proj", (16, 16)),
                ("fc1", (64, 16)),
                ("fc2", (16, 64)),
            ):
                layer = nn.Linear(shape[1], shape[0])
                with torch.no_grad():
                    layer.weight.mul_(1 + 2 * i).mul_(torch.rand_like(layer.weight) >= zeros)
                block[name] = layer
        self.head = nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = x[:, :: 1 + 3 * i]
            x = x + block["proj"](block["qkv"](x)[..., :16])
            x = x + block["fc2"](block["fc1"](x))
        return self.head(x.mean(1))


PATTERNS = {
    "qkv": r"blocks\.(?P<block>\d+)\.qkv\.weight",
    "proj": r"blocks\.(?P<block>\d+)\.proj\.weight",
    "mlp": r"blocks\.(?P<block>\d+)\.fc[12]\.weight",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HOW = {"patterns": PATTERNS}


def copied(model: nn.Module) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def shares(model, sparsity, **how):
    """What a pruning leaves, as the report has it."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruning = dimap.prune(state, sparsity, **HOW, **how)
    report = build_report(pruning, model, 32)
    dense = report.flops_dense
    return {
        "flops": report.flops / dense,
        "nominal_flops": report.flops_nominal / dense,
        "params": report.kept / report.weights,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", ["flops", "nominal_flops", "params"])
@pytest.mark.parametrize(
    "how", [{}, {"scope": "global"}, {"normalize": "module"}, {"scope": "layer"}]
)
def test_the_smallest_sparsity_that_meets_the_budget_is_found(dtype, budget, how) -> None:
    model = Net(1, dtype, zeros=0.2)
    masks = dimap.select(model, input_size=32, **{budget: 0.55}, **HOW, **how)
    pruned = dimap.prune(model, input_size=32, **{budget: 0.55}, **HOW, **how)
    assert all(torch.equal(masks[name], mask) for name, mask in pruned.masks.items())
    report = pruned.report(model, 32)
    assert report.asked == {budget: 0.55}
    assert 0.53 < report.got[budget] <= 0.55
    found = next(iter(pruned.sparsity.values()))
    dense = Net(1, dtype, zeros=0.2)
    assert shares(dense, found, **how)[budget] == report.got[budget]
    # One step less keeps a weight more of some scope, and is too much.
    step = round(found * STEPS) - 1
    assert shares(dense, step / STEPS, **how)[budget] > 0.55


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [{}, {"scope": "global"}, {"normalize": "module"}])
@pytest.mark.parametrize(
    "limits",
    [
        {"min_keep": 0.4},
        {"max_keep": 0.6},
        {"min_keep": 0.3, "max_keep": 0.7},
        {"limits": {"blocks.0.*": (0.6, 1), "mlp": (0, 0.5)}},
    ],
    ids=str,
)
def test_limits_give_the_masks_of_the_walk(dtype, how, limits) -> None:
    model = Net(2, dtype, zeros=0.3)
    with torch.no_grad():  # ties within and between layers
        for p in model.parameters():
            p.copy_((p * 20).round() / 20)
    pruning = dimap.prune(model_of := copied(model), 0.5, **HOW, **how, **limits)
    of_layers = {
        layer.name: layer.parameters
        for name, found in pruning.modules.items()
        if name != "aux"
        for layer in found
    }
    names = list(of_layers)
    tensors = [dict(model.named_parameters())[of_layers[n][0]].detach() for n in names]
    module = {
        layer.name: m for m, found in pruning.modules.items() for layer in found if m != "aux"
    }
    numbers = {m: i for i, m in enumerate(dict.fromkeys(module.values()))}
    modules = [0 if how.get("scope") == "global" else numbers[module[n]] for n in names]
    layers = [
        numbers[module[n]] if how.get("normalize") == "module" else i for i, n in enumerate(names)
    ]
    keep = [0] * (max(modules) + 1)
    for tensor, m in zip(tensors, modules, strict=True):
        keep[m] += tensor.numel()
    keep = [n - round(0.5 * n) for n in keep]
    bounds = []
    for name, tensor in zip(names, tensors, strict=True):
        low, high = limits.get("min_keep", 0), limits.get("max_keep", 1)
        if "limits" in limits and "blocks.0" in name:
            low, high = 0.6, 1
        if "limits" in limits and module[name] == "mlp":
            low, high = 0, 0.5
        n = tensor.numel()
        bounds.append((-int(-low * n // 1), int(high * n)))
    want = reference.select_limited(tensors, layers, modules, keep, list(range(len(names))), bounds)
    for name, tensor, mask, (least, most) in zip(names, tensors, want, bounds, strict=True):
        got = pruning.masks[of_layers[name][0]]
        assert torch.equal(got, mask), name
        assert least <= int(got.sum()) <= most
        assert torch.equal(model_of[of_layers[name][0]], torch.where(mask, tensor, 0)), name


def test_a_budget_within_limits_moves_what_a_limit_stops() -> None:
    model = Net(3, torch.float32)
    pruned = dimap.prune(model, input_size=32, flops=0.6, min_keep=0.5, **HOW)
    report = pruned.report(model, 32)
    assert 0.59 < report.got["flops"] <= 0.6
    assert all(layer.kept >= 0.5 * layer.weights for layer in report.layers)
    least = sum(layer.kept == -(-layer.weights // 2) for layer in report.layers)
    told = [note for note in report.notes if "the least that they may" in note]
    assert told == ([f"limits: {least} layers keep the least that they may"] if least else [])


def test_sparsities_of_some_modules_and_auto() -> None:
    model = Net(4, torch.float32)
    fixed = dimap.prune(copied(model), {"qkv": 0.1}, params=0.5, **HOW)
    assert fixed.sparsity["qkv"] == 0.1
    assert fixed.sparsity["proj"] == fixed.sparsity["mlp"] > 0.5
    one, auto = (dimap.prune(copied(model), s, params=0.5, **HOW) for s in (None, "auto"))
    assert len(set(auto.sparsity.values())) > 1
    assert auto.report().got["params"] <= 0.5

    def lost(pruning):
        """Over modules, the shares of energy that are removed: what auto makes small."""
        total = 0.0
        for name in ("qkv", "proj", "mlp"):
            layers = [p for layer in pruning.modules[name] for p in layer.parameters]
            before = sum(float(model.get_parameter(p).detach().square().sum()) for p in layers)
            total += 1 - sum(float(pruning.parameters[p].square().sum()) for p in layers) / before
        return total

    assert lost(auto) < lost(one)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 0.5, "flops": 0.6}, ValueError, "sparsity must be left to the budget of flops"),
        ({"flops": 1.1}, ValueError, r"flops must be in \[0, 1\], got 1.1"),
        ({"flops": [1]}, TypeError, "flops must be a number, got list"),
        ({"sparsity": "50%", "flops": 0.6}, ValueError, "sparsity must be left to the budget of flops"),
        ({"flops": 60}, ValueError, r"got 60: 60 % is 0.6"),
        ({"flops": 0.01}, ValueError, "flops must be at least 0.* all is pruned that may be, got 0.01"),
        ({"sparsity": 0.5, "min_keep": 0.6}, ValueError, "qkv must keep from 922 to 1536 weights .*got 768.* lower min_keep or the sparsity"),
        ({"sparsity": 0.5, "limits": {"mlp": (0.6, 0.4)}}, ValueError, "at least 615 .0.6. and at most 409 .0.4."),
        ({"sparsity": 0.5, "limits": {"nix": (0, 1)}}, ValueError, "limits must be for modules .*'nix', which matches none"),
        ({"sparsity": 0.5, "limits": {"mlp": 0.5}}, ValueError, r"limits\['mlp'\] must be \(least, most\), got 0.5"),
        ({"flop": 0.6}, TypeError, r"prune\(\) got an unexpected keyword argument 'flop'"),
        ({"params": 0.5, "nm": "2:4"}, ValueError, "nm must be given without budgets and limits, got params"),
        ({"sparsity": 0.5, "scope": "row", "min_keep": 0.1}, ValueError, "scope='row' must be given without .* got min_keep"),
        ({"size": 1000}, ValueError, "size is for a safetensors checkpoint written as bitmask"),
        ({"sparsity": "auto"}, TypeError, "must be a number where no budget shares it out, got auto"),
        ({"sparsity": "auto", "params": 0.5, "scope": "global"}, ValueError, "a scope holds several modules, got auto"),
        ({"sparsity": {"nix": 0.5}, "params": 0.5}, ValueError, "for the modules qkv, proj, mlp, got nix"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_changes_nothing(arguments, error, message) -> None:
    model = Net(5, torch.float32)
    before = copied(model)
    with pytest.raises(error, match=message):
        dimap.prune(model, input_size=32, **arguments, **HOW)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_weights_that_are_not_finite_are_named() -> None:
    model = Net(6, torch.float32)
    with torch.no_grad():
        model.blocks[1]["fc2"].weight[3, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"blocks.1.fc2.weight must be finite, got nan at flat index 194"
    ):
        dimap.prune(model, input_size=32, flops=0.6, **HOW)


def test_a_budget_of_a_state_dict_says_why_it_has_no_flops() -> None:
    with pytest.raises(ValueError, match=r"a budget of FLOPs needs .* the nn.Module does"):
        dimap.prune(copied(Net(7, torch.float32)), flops=0.6, **HOW)


def test_shares_are_the_decimal_numbers_that_were_given() -> None:
    limits = Budgets(min_keep=0.07, limits={"qkv": (0.29, 0.29)})
    plan = dimap.groups.plan.Plan.of_shapes(
        {"blocks.0.qkv.weight": (10, 10), "blocks.0.proj.weight": (10, 10)},
        "module",
        "layer",
        {k: v for k, v in PATTERNS.items() if k != "mlp"},
    )
    assert limits.of_layers(plan) == {"blocks.0.qkv": (29, 29), "blocks.0.proj": (7, 100)}
