"""The specification itself, against exact sums and against published formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from dimap import reference
from hypothesis import given, settings
from problems import problems


def test_the_example_of_the_design() -> None:
    w = torch.tensor([3.0, -1.0, 2.0, 0.0, -2.0])
    (scores,) = reference.score64([w], [0])
    assert scores.tolist() == [1.0, 1 / 18, 4 / 17, 0.0, 4 / 17]
    (mask,) = reference.select([w], [0], [0], [2])
    assert mask.tolist() == [True, False, True, False, False]


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_energy_is_the_exact_sum_rounded_once(problem) -> None:
    scores = reference.score64(problem.weights, problem.layers)
    for layer in set(problem.layers):
        members = [i for i, number in enumerate(problem.layers) if number == layer]
        v = [x for i in members for x in problem.weights[i].double().abs().flatten().tolist()]
        got = [s for i in members for s in scores[i].flatten().tolist()]
        for j in range(0, len(v), max(1, len(v) // 7)):
            energy = math.fsum(x * x for x in v if x >= v[j])
            assert got[j] == (v[j] ** 2 / energy if v[j] else 0.0)


def test_exact_sum_against_fractions() -> None:
    w = torch.tensor([1e19, 1.0, 1e-19, 3.0, 1e-19])
    (scores,) = reference.score64([w], [0])
    v = [Fraction(x) for x in w.double().tolist()]
    for x, s in zip(v, scores.tolist(), strict=True):
        energy = float(sum(y * y for y in v if y >= x))  # int / int rounds once
        assert s == float(x * x) / energy


def test_exact_sum_where_a_term_cancels_a_partial_sum() -> None:
    # Before the last four, the sum is 1 + 2^-52 with -2^-54 beside it; those four together are 2^-54.
    w = torch.tensor([1.0] + 3 * [2.0**-27] + 4 * [2.0**-28])
    (scores,) = reference.score64([w], [0])
    assert scores[-1].item() == 2.0**-56 / (1 + 2.0**-52)


def test_lamp_agrees_where_there_are_no_ties() -> None:
    # Lee et al. 2021: sort ascending, w² over the sum of the squares from it on.
    torch.manual_seed(0)
    w = torch.randn(50, 40)
    flat = w.double().flatten() ** 2
    order = flat.argsort()
    tail = flat[order].flip(0).cumsum(0).flip(0)
    lamp = torch.empty_like(flat)
    lamp[order] = flat[order] / tail
    (scores,) = reference.score64([w], [0])
    torch.testing.assert_close(scores.flatten(), lamp, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("n", "s", "keep"), [(10, 0.25, 8), (10, 0.35, 6), (1, 0.5, 1), (3, 1.0, 0)]
)
def test_keep_follows_pythons_round(n: int, s: float, keep: int) -> None:
    assert reference.keep_counts([n], [s]) == [keep]
