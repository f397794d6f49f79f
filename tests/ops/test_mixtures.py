"""Layers of unlike kinds, sizes and types that rank together: where what a sample says of one misleads in another."""

from __future__ import annotations

import random

import pytest
import torch
from dimap import ops, reference
from torch import Tensor

SIZES = (1, 7, 100, 5_000, 30_000, 70_000)  # from 16,000 on, a sample is smaller than the layer


def values(n: int, kind: int, choose: random.Random, generator: torch.Generator) -> Tensor:
    def uniform() -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    x = torch.randn(n, generator=generator)
    if kind == 1:  # another scale
        return x * 10.0 ** choose.choice([-44, -40, -38, -20, 0, 10, 30])
    if kind == 2:  # two values
        larger = uniform() < choose.random()
        return torch.where(
            larger, choose.choice([1.0, 2.0, 1e20]), choose.choice([0.0, 0.5, 1e-42])
        )
    if kind == 3:  # few values
        return (x * choose.choice([1, 4, 30])).round()
    if kind == 4:  # pruned before
        return x * (uniform() < choose.choice([0.001, 0.3, 0.9]))
    if kind == 5:  # heavy tails
        return torch.tan((uniform() - 0.5) * torch.pi).float()
    if kind == 6:  # an outlier
        x[choose.randrange(n)] = choose.choice([1e30, 1e-45, 3e38])
    if kind == 7:
        return x.sort().values
    return 1 + 1e-4 * x if kind == 8 else x  # nearly equal


@pytest.mark.parametrize("seed", range(24))
def test_mixture(seed: int) -> None:
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kinds = [choose.randrange(9) for _ in range(3)]
    weights, layers = [], []
    for layer in range(choose.choice([1, 2, 3, 6])):
        for _ in range(choose.choice([1, 1, 2])):
            n = choose.choice(SIZES)
            dtype = choose.choice([torch.float32] * 3 + [torch.bfloat16, torch.float16])
            w = values(n, choose.choice(kinds), choose, generator)
            w = w.clamp(-6e4, 6e4) if dtype == torch.float16 else w
            weights.append(w.to(dtype).nan_to_num(1.0, 1.0, 1.0))
            layers.append(layer)
    total = sum(w.numel() for w in weights)
    nonzero = sum(int((w != 0).sum()) for w in weights)
    scores = reference.score64(weights, layers)
    modules = [0] * len(weights)
    for keep in {0, 1, round(0.45 * total), nonzero - 1, nonzero, nonzero + 1, total - 1, total}:
        if not 0 <= keep <= total:
            continue
        masks = reference.select_by(scores, modules, [keep])
        got = ops.select(weights, layers, modules, [keep])
        pruned = [w.clone() for w in weights]
        ops.prune_(pruned, layers, modules, [keep])
        for g, m, p, w in zip(got, masks, pruned, weights, strict=True):
            assert torch.equal(g, m)
            assert torch.equal(p, torch.where(m, w, torch.zeros_like(w)))


@pytest.mark.parametrize("together", ["one module", "each alone", "eight modules"])
@pytest.mark.parametrize("seed", range(8))
def test_many_small_layers(seed: int, together: str) -> None:
    """Layers of one chunk, of which little is sampled: their brackets come from a closer look, right or wrong."""
    choose = random.Random(100 + seed)
    generator = torch.Generator().manual_seed(100 + seed)
    kinds = [choose.randrange(9) for _ in range(choose.choice([1, 3]))]
    dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    weights = []
    for _ in range(60):
        n = choose.choice([1, 300, 1_500, 2_500, 2_500, 6_000])
        w = values(n, choose.choice(kinds), choose, generator)
        w = w.clamp(-6e4, 6e4) if dtype == torch.float16 else w
        weights.append(w.to(dtype).nan_to_num(1.0, 1.0, 1.0))
    layers = list(range(60))
    modules = {
        "one module": [0] * 60,
        "each alone": layers,
        "eight modules": [i % 8 for i in layers],
    }
    of = modules[together]
    totals = [0] * (max(of) + 1)
    for w, m in zip(weights, of, strict=True):
        totals[m] += w.numel()
    scores = reference.score64(weights, layers)
    for share in (0.05, 0.45, 0.9, 1.0):
        keep = [round(share * n) for n in totals]
        masks = reference.select_by(scores, of, keep)
        got, thresholds = ops.select_cuts(weights, layers, of, keep)
        for g, m in zip(got, masks, strict=True):
            assert torch.equal(g, m)
        for m, threshold in enumerate(thresholds.tolist()):
            kept = [s[g] for s, g, of_m in zip(scores, got, of, strict=True) if of_m == m]
            assert not keep[m] or threshold == min(k.min().item() for k in kept if k.numel())


def test_tails_beyond_the_grid_of_tiny_layers() -> None:
    """Heavy tails of layers so small that all of them is sampled, in wide bins: each alone in its module."""
    generator = torch.Generator().manual_seed(0)
    weights = [values(64, 5, random.Random(0), generator) for _ in range(300)]
    numbers = list(range(300))
    scores = reference.score64(weights, numbers)
    _, thresholds = ops.select_cuts(weights, numbers, numbers, [63] * 300)
    assert thresholds.tolist() == [s.sort().values[1].item() for s in scores]
