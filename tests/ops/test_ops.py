"""score, select, select_cuts, prune_ and apply_ against the specification."""

from __future__ import annotations

import math

import pytest
import torch
from dimap import ops, reference
from hypothesis import given, settings
from operators import check
from problems import DTYPES, KINDS, Problem, cast, problems, values


@given(problem=problems())
@settings(max_examples=250, deadline=None)
def test_any_problem(device: str, problem: Problem) -> None:
    check(problem, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_in_large_tensors(kind: str, dtype: torch.dtype, device: str) -> None:
    # Large enough for samples, several chunks and the vector loops; three layers in two modules.
    weights = [
        cast(values(kind, n, seed), dtype) for seed, n in enumerate([150_001, 40_000, 60_007])
    ]
    scores = reference.score64(weights, [0, 1, 2])
    for share in (0.45, 0.03, 0.97):
        keep = [round(share * 190_001), round(share * 60_007)]
        check(Problem(weights, [0, 1, 2], [0, 0, 1], keep), device, scores)


def test_layers_of_very_different_scales(device: str) -> None:
    weights = [
        cast(values("normal", 20_000, s) * 10.0 ** (-38 + 10 * s), torch.float32) for s in range(8)
    ]
    check(Problem(weights, list(range(8)), [0] * 8, [60_000]), device)


def test_one_large_layer_among_hundreds_of_small_ones(device: str) -> None:
    weights = [values("normal", 200_000, 0).float()]
    weights += [values("normal", 100, s).float() * (1 + s) for s in range(1, 300)]
    check(Problem(weights, list(range(300)), [0] * 300, [90_000]), device)


def test_layers_of_several_tensors_and_types(device: str) -> None:
    weights = [cast(values("normal", 5_000 + i, i), DTYPES[i % 3]) for i in range(9)]
    layers, modules = [0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 0, 0, 1, 0]
    check(Problem(weights, layers, modules, [9_000, 7_000]), device)


def test_weights_already_pruned_once(device: str) -> None:
    weights = [values("normal", 50_000, s).float() for s in range(3)]
    first = [30_000, 15_000]
    ops.prune_(weights, [0, 1, 2], [0, 0, 1], first)
    check(Problem(weights, [0, 1, 2], [0, 0, 1], first), device)  # nothing more to drop
    check(Problem(weights, [0, 1, 2], [0, 0, 1], [25_000, 7_000]), device)
    check(Problem(weights, [0, 1, 2], [0, 0, 1], [40_000, 17_000]), device)  # some zeros are kept


def test_every_layer_has_a_weight_that_scores_one(device: str) -> None:
    weights = [values("normal", 1_000, s).float() for s in range(20)]
    check(
        Problem(weights, list(range(20)), [0] * 20, [7]), device
    )  # ties across layers: the first seven


def test_ties_go_to_the_earlier_tensor_then_the_lower_index(device: str) -> None:
    a, b = (torch.tensor([1.0, 2.0, 1.0], device=device) for _ in range(2))
    masks = ops.select([a, b], [0, 0], [0, 0], [4])
    assert [m.tolist() for m in masks] == [[True, True, True], [False, True, False]]


def test_zeros_are_kept_last_and_in_order(device: str) -> None:
    w = torch.tensor([0.0, -0.0, 5.0, 0.0], device=device)
    (mask,) = ops.select([w], [0], [0], [3])
    assert mask.tolist() == [True, True, True, False]


def test_no_tensors() -> None:
    assert ops.score([], []) == []
    masks, thresholds = ops.select_cuts([], [], [], [0])
    assert masks == []
    assert math.isnan(thresholds[0])
    ops.prune_([], [], [], [])


def test_empty_tensors_only(device: str) -> None:
    check(Problem([torch.empty(0), torch.empty(3, 0)], [0, 1], [0, 0], [0]), device)


@pytest.mark.parametrize("flush", [False, True])
def test_flush_to_zero_mode_changes_nothing(flush: bool) -> None:
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot flush denormals")
    try:
        weights = [cast(values("denormals", 5_000, 1), torch.float32)]
        weights.append(cast(values("normal", 5_000, 2) * 1e-6, torch.float16))
        torch.set_flush_denormal(False)
        want = reference.select(weights, [0, 1], [0, 0], [4_000])
        torch.set_flush_denormal(flush)
        got = ops.select(weights, [0, 1], [0, 0], [4_000])
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_expanded_and_strided_inputs(device: str) -> None:
    base = values("normal", 60_000, 3).float().reshape(200, 300).to(device)
    views = [base[::2, 1::3], base.t(), base[:, :1].expand(200, 50)]
    masks = ops.select(views, [0, 1, 2], [0, 0, 0], [30_000])
    want = reference.select([v.cpu() for v in views], [0, 1, 2], [0, 0, 0], [30_000])
    assert all(torch.equal(m.cpu(), w) for m, w in zip(masks, want, strict=True))
    assert all(m.is_contiguous() for m in masks)


def test_keep_all(device: str) -> None:
    """The threshold is the smallest weight's score, many octaves below most weights."""
    random = torch.Generator().manual_seed(0)
    layers = [torch.randn(n, generator=random) * 10.0**e for n, e in ((300_000, 0), (70_000, -30))]
    check(Problem(layers, [0, 1], [0, 0], [370_000]), device)
