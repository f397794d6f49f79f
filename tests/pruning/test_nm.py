"""N:M of whole models: every layer to prune, along its input, and no other."""

from __future__ import annotations

from itertools import product

import dimap
import pytest
import torch
from checkpoints import vit
from dimap import reference
from dimap.groups import Slice, nm
from dimap.groups.nm import NM, in_layers, input_axes, pattern_of, round_kept
from dimap.groups.plan import Plan
from dimap.pruning import most_in_groups
from hypothesis import example, given, settings
from hypothesis import strategies as st


def gpt(layout: str, width: int = 16, bias: bool = True) -> dict[str, torch.Tensor]:
    """Blocks named as GPT-2's: of Conv1D, [in, out], or as nanoGPT's and GPT-BigCode's of Linear."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    state = {"wte.weight": torch.randn(12, width), "wpe.weight": torch.randn(8, width)}
    for block, (name, size) in product(range(2), sizes.items()):
        shape = size if layout == "conv1d" else size[::-1]
        state[f"h.{block}.{name}.weight"] = torch.randn(shape, generator=generator)
        if bias:
            state[f"h.{block}.{name}.bias"] = torch.randn(size[1], generator=generator)
    return state


def experts(layout: str, bias: bool, hidden: int = 8, inner: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(16, hidden)}
    for block in range(2):
        start = f"model.layers.{block}."
        for x in "qkvo":
            state[f"{start}self_attn.{x}_proj.weight"] = torch.randn(hidden, hidden)
        for name, size in (("gate_up_proj", (hidden, 2 * inner)), ("down_proj", (inner, hidden))):
            shape = size if layout == "in, out" else size[::-1]
            weight = torch.randn(3, *shape, generator=generator)
            state[f"{start}mlp.experts.{name}"] = weight
            if bias:
                state[f"{start}mlp.experts.{name}_bias"] = torch.randn(3, size[1])
    return state


def check(state: dict[str, torch.Tensor], n: int, m: int, axis_of: dict[str, int]) -> None:
    """Prune a copy; every weight named in axis_of is N:M along its axis, the others are as they were."""
    pruned = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(pruned, nm=f"{n}:{m}")
    assert pruning.masks.keys() == axis_of.keys()
    for name, weight in state.items():
        want = weight
        if name in axis_of:
            [mask] = reference.select_nm([weight], n, m, axis_of[name])
            assert torch.equal(pruning.masks[name], mask), name
            want = weight * mask
        assert torch.equal(pruned[name], want), name


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (16, 16), (3, 16)])
def test_vit(n: int, m: int) -> None:
    state = vit()
    prunable = [x for x in state if x.startswith("blocks.") and state[x].ndim > 1]
    check(state, n, m, dict.fromkeys(prunable, -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["conv1d", "linear"])
def test_gpt(layout: str, bias: bool) -> None:
    state = gpt(layout, bias=bias)
    prunable = [x for x in state if x.startswith("h.") and state[x].ndim > 1]
    # Conv1D always has a bias; without one nothing tells it from nanoGPT's Linear.
    check(state, 2, 4, dict.fromkeys(prunable, -2 if layout == "conv1d" and bias else -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["in, out", "out, in"])
def test_experts(layout: str, bias: bool) -> None:
    state = experts(layout, bias)
    axis = {x: -1 for x in state if "self_attn" in x}
    axis |= {
        x: -2 if layout == "in, out" else -1 for x in state if x.endswith(("up_proj", "down_proj"))
    }
    check(state, 2, 4, axis)
    # As wide inside as outside, of which each half is a gate: still told apart.
    state = experts(layout, bias, hidden=8, inner=4)
    axis = input_axes(dimap.find_modules(state), {k: tuple(v.shape) for k, v in state.items()})
    said = {a for name, a in axis.items() if isinstance(name, Slice)}
    assert said == {-2 if layout == "in, out" else -1}


def test_convolutions_are_grouped_along_their_input_channels() -> None:
    state = {f"blocks.{i}.conv.weight": torch.randn(6, 8, 3, 3) for i in range(2)}
    patterns = {"conv": r"blocks\.(?P<block>\d+)\.conv\.weight"}
    pruned = {k: v.clone() for k, v in state.items()}
    masks = dimap.prune(pruned, nm="2:4", patterns=patterns).masks
    for name, weight in state.items():
        assert torch.equal(masks[name], reference.select_nm([weight], 2, 4, 1)[0])


def test_layers_that_groups_do_not_fit_are_left_dense() -> None:
    state = vit(width=20)  # inputs of 20 and 80
    pruned = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(pruned, nm="2:8")
    assert list(pruning.masks) == [f"blocks.{i}.mlp.fc2.weight" for i in range(2)]
    note = "left dense, since 8 does not divide their inputs: 6 layers, blocks.0.attn.qkv with 20 inputs the first"
    assert pruning.notes == [note]
    assert note in pruning.report().notes
    assert torch.equal(pruned["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert pruning.nm == {f"blocks.{i}.mlp.fc2": "2:8" for i in range(2)}
    with pytest.raises(
        ValueError, match=r"inputs are a multiple of 7, got none: 8 layers, blocks\.0"
    ):
        dimap.select(state, nm="2:7")


def test_in_a_model_of_every_type_and_its_report() -> None:
    model = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([torch.nn.Linear(12, 8, bias=False)])}
    )
    model.bfloat16()
    patterns = {"all": r"blocks\.(?P<block>\d+)\.weight"}
    pruning = dimap.prune(model, nm="1:4", patterns=patterns)
    report = pruning.report()
    assert report.layers[0].nm == "1:4"
    assert report.layers[0].kept == 24
    assert report.layers[0].threshold is None
    assert str(report).startswith("1:4 in 1 of 1 layers\nsparsity 0.75")
    assert report == type(report).from_dict(report.to_dict())
    assert dimap.select(model, nm="1:4", patterns=patterns).keys() == pruning.masks.keys()


def test_a_saliency_in_place_of_the_magnitudes() -> None:
    state = vit()
    masks = dimap.select(state, nm="2:4")
    saliency = {name: torch.rand_like(w) for name, w in state.items() if name in masks}
    for name, mask in dimap.select(state, nm="2:4", saliency=saliency).items():
        assert torch.equal(mask, reference.select_nm([saliency[name]], 2, 4)[0])


@pytest.mark.parametrize(
    "nm", ["2", "4:2", "0:4", "1:1", "3:17", "2-4", "auto:1", "auto:17", "", "-1:4", 24]
)
def test_what_is_no_pattern(nm: str) -> None:
    with pytest.raises(ValueError, match=r"nm \(--nm\) must be N:M with N from 1 to M"):
        dimap.select(vit(), nm=nm)


@pytest.mark.parametrize("more", [{"sparsity": 0.5}, {"scope": "layer"}, {"normalize": "block"}])
def test_a_fixed_pattern_says_it_all(more: dict[str, object]) -> None:
    [name] = more
    with pytest.raises(ValueError, match=rf"{name} must be left out with nm 2:4"):
        dimap.select(vit(), nm="2:4", **more)


def test_neither_sparsity_nor_pattern() -> None:
    for more in ({}, {"nm": "auto"}):
        with pytest.raises(TypeError, match=r"prune needs sparsity as 0\.5"):
            dimap.select(vit(), **more)


def test_nothing_is_changed_where_a_weight_is_not_finite() -> None:
    state = vit()
    state["blocks.1.mlp.fc2.weight"][3, 5] = float("nan")
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.fc2\.weight must be finite, got nan at flat index 389"
    ):
        dimap.prune(state, nm="2:4")
    assert all(torch.equal(state[x].nan_to_num(9), before[x].nan_to_num(9)) for x in state)


# Which N each layer gets


@pytest.mark.parametrize("m", [4, 8, 16])
@pytest.mark.parametrize("more", [{}, {"scope": "global"}, {"scope": "layer"}, {"method": "lamp"}])
def test_auto_gives_each_layer_its_share_rounded(m: int, more: dict[str, object]) -> None:
    state = vit()
    for i, name in enumerate(x for x in state if state[x].ndim == 2):
        state[name] *= 1 + i % 3
    plain, auto = (
        dimap.select(state, 0.5, **more),
        dimap.prune(dict(state), 0.5, nm=f"auto:{m}", **more),
    )
    plan = Plan.of(state, auto.scope, auto.normalize)
    for scope in range(len(plan.scope_names)):
        names = [n for n, s in zip(plan.names, plan.scopes, strict=True) if s == scope]
        kept = [int(plain[n].sum()) for n in names]
        want = round_kept(kept, [state[n].numel() for n in names], m)
        for name, n in zip(names, want, strict=True):
            assert auto.nm[name.removesuffix(".weight")] == f"{n}:{m}"
    for name, mask in auto.masks.items():
        n = int(auto.nm[name.removesuffix(".weight")].split(":")[0])
        assert torch.equal(mask, reference.select_nm([state[name]], n, m)[0])


@given(
    layers=st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 3, 5, 8, 64]), st.floats(0, 1)), min_size=1, max_size=9
    ),
    m=st.sampled_from([2, 3, 4, 8, 16]),
)
@example(layers=[(1, 0.6)] * 9, m=4)
@example(layers=[(1, 0.0), (2, 1.0), (4, 0.5)], m=4)
@settings(max_examples=200, deadline=None)
def test_rounding_meets_the_total_as_nearly_as_it_can_be(
    layers: list[tuple[int, float]], m: int
) -> None:
    sizes = [groups * m for groups, _ in layers]
    kept = [round(share * size) for size, (_, share) in zip(sizes, layers, strict=True)]
    assert round_kept(kept, sizes, m) == reference.nm_counts(kept, sizes, m)


@pytest.mark.parametrize(
    ("count", "states"), [(60, 4000), pytest.param(200, nm.STATES, marks=pytest.mark.large)]
)
def test_rounding_many_layers_of_many_sizes_ends_and_is_near(
    count: int, states: int, monkeypatch
) -> None:
    monkeypatch.setattr(nm, "STATES", states)
    generator = torch.Generator().manual_seed(0)
    sizes = [4 * int(x) for x in torch.randint(10**5, 10**7, (count,), generator=generator)]
    kept = [int(s * float(torch.rand(1, generator=generator))) for s in sizes]
    counts = round_kept(kept, sizes, 4)
    assert all(
        k * 4 // s <= n <= -(-k * 4 // s) for n, k, s in zip(counts, kept, sizes, strict=True)
    )
    got = sum(n * s // 4 for n, s in zip(counts, sizes, strict=True))
    assert abs(got - sum(kept)) <= max(sizes) / 4


# Which pattern a layer has


@pytest.mark.parametrize("m", range(2, 17))
def test_patterns_are_named(m: int) -> None:
    w = torch.randn(64, 720720 // 1001, generator=torch.Generator().manual_seed(m))  # 720 columns
    if 720 % m:
        w = w[:, : 720 // m * m].contiguous()
    for n in range(1, m):
        [mask] = reference.select_nm([w], n, m)
        least = min((b, a) for b in range(1, m + 1) for a in range(1, b + 1) if a * m == b * n)
        want = f"{least[1]}:{least[0]}"  # 4:8 may be 1:2 as well, if no group says otherwise
        found = pattern_of(most_in_groups(w * mask, -1), int(mask.sum()), w.numel())
        assert found == f"{n}:{m}" or (found == want and want != f"{n}:{m}"), (n, m, found)


def test_chance_is_no_pattern() -> None:
    generator = torch.Generator().manual_seed(0)
    for density in (0.02, 0.1, 0.3, 0.45, 0.8, 1.0):
        w = torch.randn(96, 384, generator=generator)
        w[torch.rand(w.shape, generator=generator) > density] = 0
        assert pattern_of(most_in_groups(w, -1), int(w.count_nonzero()), w.numel()) is None
    late = torch.zeros(200, 48)  # whose only full groups are in its last row
    late[-1, :6] = 1
    assert most_in_groups(late, -1)[2:9] == [2, 3, 4, 5, 6, 7, 6]
    assert pattern_of(most_in_groups(torch.zeros(8, 16), -1), 0, 128) is None
    assert pattern_of(list(range(17)), 0, 0) is None


@pytest.mark.parametrize("width", [128, 192, 384])
def test_chance_is_no_pattern_in_any_of_many_layers(width: int) -> None:
    """At these sizes a group of 16 that holds 15 of them is rare, yet none is no pattern."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        w = torch.rand(width, width, generator=generator) > 0.48
        assert pattern_of(most_in_groups(w, -1), int(w.count_nonzero()), w.numel()) is None


def test_groups_with_more_zeros_still_have_their_pattern() -> None:
    w = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    w *= reference.select_nm([w], 2, 4)[0] & (torch.rand(w.shape) < 0.5)
    assert pattern_of(most_in_groups(w, -1), int(w.count_nonzero()), w.numel()) == "2:4"


def test_words() -> None:
    assert in_layers(["2:4"] * 48) == "2:4 in 48 of 48 layers"
    assert in_layers(["2:4", "1:4", None, "2:4"]) == "2:4 in 2, 1:4 in 1 of 4 layers"
    assert in_layers([None]) == in_layers([]) == ""
    assert str(NM.parse("auto")) == "auto:4"
    assert NM.parse(None) is None
