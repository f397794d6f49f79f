"""Problems for the operators: tensors, layers, modules and keep, drawn or handmade."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Problem:
    weights: list[Tensor]
    layers: list[int]
    modules: list[int]
    keep: list[int]

    def args(self) -> tuple[list[Tensor], list[int], list[int], list[int]]:
        return self.weights, self.layers, self.modules, self.keep


# Weights that are hard on something, from normal x and uniform u in float64, and a generator.
MAKERS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "normal": lambda x, u, g: x,
    "equal": lambda x, u, g: torch.full_like(x, 0.5),
    "two values": lambda x, u, g: torch.where(u < 0.5, 0.25, -1.5).double(),
    "small integers": lambda x, u, g: torch.randint(-3, 4, x.shape, generator=g).double(),
    "denormals": lambda x, u, g: x * 1e-42,
    "huge and tiny": lambda x, u, g: x * torch.exp(15 * x.flip(0)),
    "zeros": lambda x, u, g: torch.where(u < 0.95, 0.0, x),
    "all zero": lambda x, u, g: torch.zeros_like(x),
    "tiny scale": lambda x, u, g: x * 1e-20,
    "large scale": lambda x, u, g: x * 1e20,
    "cauchy": lambda x, u, g: torch.tan((u - 0.5) * 3.141),
    "sorted": lambda x, u, g: x.sort().values,
    "periodic": lambda x, u, g: sines(len(x)) * (1 + torch.arange(len(x)) % 16),
    "grid": lambda x, u, g: (u * 255).round() - 128,
    "outlier": lambda x, u, g: torch.cat([torch.full_like(x[:1], 1e30), x[:-1]]),
}
KINDS = list(MAKERS)


def sines(n: int) -> Tensor:
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.1)


def values(kind: str, n: int, seed: int) -> Tensor:
    """n float64 values of a kind that is hard on something."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g, dtype=torch.float64)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    return MAKERS[kind](normal, uniform, g)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To the type, with its largest finite value where x is beyond it."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


SIZES = [0, 1, 2, 15, 16, 17, 19, 63, 64, 65, 111, 700, 1000]


@st.composite
def problems(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Problem:
    """Up to seven tensors in any grouping, with any count kept."""
    count = draw(st.integers(1, 7))
    layer_count = draw(st.integers(1, count))
    module_count = draw(st.integers(1, layer_count))
    module_of = [draw(st.integers(0, module_count - 1)) for _ in range(layer_count)]
    weights, layers = [], []
    for i in range(count):
        n = draw(st.sampled_from(SIZES))
        kind = draw(st.sampled_from(KINDS))
        w = cast(values(kind, n, draw(st.integers(0, 10**6))), draw(st.sampled_from(dtypes)))
        if n == 1 and draw(st.booleans()):
            w = w.reshape(())
        if n % 2 == 0 and n and draw(st.booleans()):
            w = w.reshape(2, -1).t()
        weights.append(w)
        layers.append(i if i < layer_count else draw(st.integers(0, layer_count - 1)))
    modules = [module_of[layer] for layer in layers]
    totals = [
        sum(w.numel() for w, number in zip(weights, modules, strict=True) if number == m)
        for m in range(module_count)
    ]
    keep = [draw(st.one_of(st.just(0), st.just(n), st.integers(0, n))) for n in totals]
    return Problem(weights, layers, modules, keep)
