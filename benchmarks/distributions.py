"""Weights that are hard on an engine that samples, counts or sorts: what it must be exact on, and not slow.

Each distribution is a list of float32 layers with about n weights in all, the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHARES = (0.5, 0.3, 0.2)  # of three layers


def _normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def _layers(n: int, make: Callable[[int, int], Tensor]) -> list[Tensor]:
    return [make(max(1, round(n * share)), i) for i, share in enumerate(SHARES)]


def _cauchy(n: int, seed: int) -> Tensor:
    return 1e-3 * torch.tan((_uniform(n, seed).double() - 0.5) * torch.pi).float()


def _outlier(n: int, seed: int) -> Tensor:
    w = _normal(n, seed)
    w[n // 2] = 1e30
    return w


def _periodic(n: int, seed: int) -> Tensor:
    """Ten times as large in a few places of every period, another period in each layer."""
    period, width = ((768, 16), (256, 16), (4096, 64))[seed]
    return _normal(n, seed) * torch.where(torch.arange(n) % period < width, 1.0, 0.1)


def _pruned(n: int, seed: int) -> Tensor:
    w = _normal(n, seed)
    return w * (w.abs() > 0.7554)  # 55 % of a normal distribution


def _one_large(n: int) -> list[Tensor]:
    return [_normal(max(1, n - 30_000), 0), *(_normal(100, s) * (1 + s % 7) for s in range(1, 301))]


DISTRIBUTIONS: dict[str, Callable[[int], list[Tensor]]] = {
    "normal": lambda n: _layers(n, _normal),
    "sorted, smallest first": lambda n: _layers(n, lambda m, s: _normal(m, s).sort().values),
    "sorted, largest first": lambda n: _layers(n, lambda m, s: _normal(m, s).sort().values.flip(0)),
    "all equal": lambda n: _layers(n, lambda m, s: torch.full((m,), 0.5)),
    "two values": lambda n: _layers(n, lambda m, s: torch.where(_uniform(m, s) < 0.5, 0.25, -1.5)),
    "99.9 % zeros": lambda n: _layers(n, lambda m, s: _normal(m, s) * (_uniform(m, s + 9) < 0.001)),
    "Cauchy tails": lambda n: _layers(n, _cauchy),
    "one outlier of 1e30": lambda n: _layers(n, _outlier),
    "denormals only": lambda n: _layers(
        n, lambda m, s: (_normal(m, s) * 3e-40).clamp(-1.17e-38, 1.17e-38)
    ),
    "8-bit grid": lambda n: _layers(n, lambda m, s: (_uniform(m, s) * 254 - 127).round() / 127),
    "scales 1e40 apart": lambda n: _layers(n, lambda m, s: _normal(m, s) * (1e-20, 1e20, 1.0)[s]),
    "periodic": lambda n: _layers(n, _periodic),
    "pruned once": lambda n: _layers(n, _pruned),
    "one large layer, 300 of 100": _one_large,
}
