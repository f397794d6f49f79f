"""Masks on the weights that are hard on samples, tables and sorts: every scope, every type.

The small sizes are held against reference.py; the larger ones, which sample, bracket and fall back as
networks do, against what exact scores demand.
"""

from __future__ import annotations

import pytest
import torch
from dimap import ops, reference
from distributions import DISTRIBUTIONS
from exact import assert_masks, assert_pruned
from problems import DTYPES, cast
from torch import Tensor

SCOPES = ["module", "global", "layer"]
SPARSITIES = (0.55, 0.02, 0.97)


def modules_of(count: int, scope: str) -> list[int]:
    return {
        "module": [0 if i == 1 else 1 for i in range(count)],
        "global": [0] * count,
        "layer": list(range(count)),
    }[scope]


def keep_of(weights: list[Tensor], modules: list[int], sparsity: float) -> list[int]:
    totals = [0] * (max(modules) + 1)
    for w, m in zip(weights, modules, strict=True):
        totals[m] += w.numel()
    return reference.keep_counts(totals, [sparsity] * len(totals))


def pruned(weights: list[Tensor], *args: list[int]) -> list[Tensor]:
    out = [w.clone() for w in weights]
    ops.prune_(out, *args)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_small_against_the_reference(name: str, dtype: torch.dtype) -> None:
    weights = [cast(w.double(), dtype) for w in DISTRIBUTIONS[name](36_000)]
    layers = list(range(len(weights)))
    scores = reference.score64(weights, layers)
    for scope in SCOPES:
        modules = modules_of(len(weights), scope)
        for sparsity in SPARSITIES:
            keep = keep_of(weights, modules, sparsity)
            masks = ops.select(weights, layers, modules, keep)
            want = reference.select_by(scores, modules, keep)
            assert all(torch.equal(a, b) for a, b in zip(masks, want, strict=True))
            assert_pruned(weights, masks, pruned(weights, layers, modules, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_large_by_exact_scores(name: str, dtype: torch.dtype) -> None:
    weights = [cast(w, dtype) for w in DISTRIBUTIONS[name](1_200_000)]
    layers = list(range(len(weights)))
    for scope in SCOPES if len(weights) < 10 else ["module"]:
        modules = modules_of(len(weights), scope)
        keep = keep_of(weights, modules, 0.55)
        masks = ops.select(weights, layers, modules, keep)
        assert_masks(weights, layers, modules, keep, masks)
        assert_pruned(weights, masks, pruned(weights, layers, modules, keep))


def test_past_the_caches_and_in_chunks_of_many_threads(threads) -> None:
    weights = DISTRIBUTIONS["normal"](12_000_000)
    args = ([0, 1, 2], [0, 0, 0], [5_000_000])
    masks = ops.select(weights, *args)
    assert_masks(weights, *args, masks)
    threads(16)
    assert all(torch.equal(a, b) for a, b in zip(masks, ops.select(weights, *args), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_of_many_layers_are_guessed_wrong(dtype: torch.dtype) -> None:
    """A sample of half of the weights misses, here and there, where nearly all of the energy is."""
    generator = torch.Generator().manual_seed(0)
    weights = list(torch.randn(1000, 1 << 14, generator=generator).to(dtype).unbind())
    for i in range(0, 1000, 125):
        weights[i][5000:5020] = 300.0
    args = [*range(1000)], [0] * 1000, [7_000_000]
    masks = ops.select(weights, *args)
    assert_masks(weights, *args, masks)
    assert_pruned(weights, masks, pruned(weights, *args))


def wrong_masks(change: str) -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 5.0])]
    masks = reference.select(weights, [0, 1], [0, 0], [3])
    assert [m.tolist() for m in masks] == [[True, False, True, False, False], [False, False, True]]
    if change == "smaller":
        masks[0] = torch.tensor([True, True, False, False, False])
    elif change == "other layer":
        masks = [
            torch.tensor([True, False, False, False, False]),
            torch.tensor([True, False, True]),
        ]
    elif change == "one more":
        masks[0] = torch.tensor([True, True, True, False, False])
    return weights, masks


@pytest.mark.parametrize("change", ["", "smaller", "other layer", "one more"])
def test_the_check_itself(change: str) -> None:
    weights, masks = wrong_masks(change)
    if not change:
        assert_masks(weights, [0, 1], [0, 0], [3], masks)
        return
    with pytest.raises(AssertionError):
        assert_masks(weights, [0, 1], [0, 0], [3], masks)


def test_the_check_of_ties() -> None:
    weights = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])]  # all score 1/2
    args = (weights, [0, 1], [0, 0], [2])
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    assert_masks(*args, [yes, no])
    for masks in ([no, yes], [torch.tensor([False, True]), torch.tensor([True, False])]):
        with pytest.raises(AssertionError, match="tie"):
            assert_masks(*args, masks)
