"""Problems for the operators: tensors, layers, modules and keep, drawn or handmade."""

from __future__ import annotations

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


def values(kind: str, n: int, seed: int) -> Tensor:
    """n float64 values of a kind that is hard on something."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g, dtype=torch.float64)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    return {
        "normal": normal,
        "equal": torch.full((n,), 0.5, dtype=torch.float64),
        "two values": torch.where(uniform < 0.5, 0.25, -1.5),
        "small integers": torch.randint(-3, 4, (n,), generator=g).double(),
        "denormals": normal * 1e-42,
        "huge and tiny": normal * torch.exp(15 * normal.flip(0)),
        "zeros": torch.where(uniform < 0.95, 0.0, normal),
        "all zero": torch.zeros(n, dtype=torch.float64),
        "tiny scale": normal * 1e-20,
        "large scale": normal * 1e20,
        "cauchy": torch.tan((uniform - 0.5) * 3.141),
        "sorted": normal.sort().values,
        "periodic": torch.sin(torch.arange(n, dtype=torch.float64) * 0.1)
        * (1 + torch.arange(n) % 16),
        "grid": (uniform * 255).round() - 128,
        "outlier": torch.cat([torch.tensor([1e30], dtype=torch.float64), normal])[:n],
    }[kind]


KINDS = [
    "normal", "equal", "two values", "small integers", "denormals", "huge and tiny", "zeros",
    "all zero", "tiny scale", "large scale", "cauchy", "sorted", "periodic", "grid", "outlier",
]  # fmt: skip


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
