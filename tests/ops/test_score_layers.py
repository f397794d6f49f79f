"""score on layers that take each of its ways: sorted, in buckets, shared by all threads, through a table."""

from __future__ import annotations

import pytest
import torch
from dimap import ops, reference
from distributions import DISTRIBUTIONS
from exact import assert_scores
from operators import assert_scores as assert_scores_of_reference
from problems import DTYPES, cast
from torch import Tensor

SORTED, SHARED = 65_536, 1 << 23  # where csrc/cpu/score/score.cpp changes its way


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def check(*weights: Tensor) -> None:
    """All of them one layer."""
    scores = ops.score(list(weights), [0] * len(weights))
    assert [s.shape for s in scores] == [w.shape for w in weights]
    assert_scores(weights, scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_hard_distributions_against_the_reference(name: str, dtype: torch.dtype) -> None:
    # The three layers: in buckets, sorted, sorted.
    weights = [cast(w.double(), dtype) for w in DISTRIBUTIONS[name](140_000)]
    layers = list(range(len(weights)))
    want = reference.score64(weights, layers)
    for got, expected in zip(ops.score(weights, layers), want, strict=True):
        assert_scores_of_reference(got, expected)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_hard_distributions_in_a_million(name: str) -> None:
    weights = DISTRIBUTIONS[name](1_000_000)
    scores = ops.score(weights, list(range(len(weights))))
    for w, score in zip(weights[:5], scores[:5], strict=True):
        assert_scores([w], [score])


@pytest.mark.parametrize("n", [1, 1_000, SORTED - 1, SORTED, SORTED + 1, 100_000, 300_000, 1 << 20])
def test_sizes_around_the_switches(n: int) -> None:
    check(normal(n) * 0.02)


@pytest.mark.parametrize("n", [SHARED - 1, SHARED, SHARED + 77])
def test_sizes_around_sharing(n: int, threads) -> None:
    w = normal(n) * 0.02
    w[:1000] = 0
    w[1000:2000] = 0.02
    threads(3)
    check(w)


SINGLES = {
    "narrow": lambda: 1 + uniform(400_000) * 1e-5,
    "narrow, larger": lambda: 1 + uniform(2_000_000) * 1e-3,
    "wide": lambda: (
        (uniform(400_000) - 0.5) * torch.exp2((uniform(400_000, 1) * 200 - 100).round())
    ),
    "huge": lambda: normal(400_000) * 1e19,
    "near the largest": lambda: (uniform(400_000) * 2 - 1) * 3.4e38,
    "near the smallest normal": lambda: normal(400_000) * 1.2e-38,
    "a grid of halves": lambda: normal(400_000).half().float(),
    "a grid of halves, larger": lambda: normal(2_000_000).half().float(),
    "a few large ones above many": lambda: torch.cat([normal(10) * 1e6, normal(300_000)]),
    "one magnitude, both signs": lambda: torch.where(uniform(300_000) < 0.5, 0.3, -0.3),
    "all zero": lambda: torch.zeros(300_000),
    "zeros and one": lambda: torch.cat([torch.zeros(300_000), torch.ones(1)]),
    "one bucket and its neighbours": lambda: torch.cat(
        [torch.full((60_000,), 1.0), 1 + uniform(60_000) * 2**-7, torch.full((60_000,), 1 - 2**-24)]
    ),
    "every key of a bucket, twice": lambda: (
        (torch.arange(131_072) % 65_536 + (127 << 23)).int().view(torch.float32)
    ),
}


@pytest.mark.parametrize("make", SINGLES.values(), ids=SINGLES)
def test_hard_layers(make) -> None:
    check(make())


def test_layer_of_several_tensors() -> None:
    check(normal(70_000), normal(200_000, 1) * 1e-3, normal(3, 2), torch.empty(0))


def test_layer_of_several_types() -> None:
    check(normal(70_000), normal(200_000, 1).bfloat16(), normal(30_000, 2).half())


def test_shared_layer_of_several_tensors(threads) -> None:
    threads(3)
    check(normal(5_000_000), normal(3_500_000, 1) * 3, normal(100, 2))


def test_large_table(threads) -> None:
    threads(3)
    check(normal(3_000_000).bfloat16(), normal(111, 1).bfloat16())
