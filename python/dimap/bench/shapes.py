"""The prunable weights of Swin (Liu et al., 2021) as shapes: what the benchmarks run on.

Each entry is one layer: (module, rows, columns). Random normal weights with a scale of their own
for each layer stand in for trained ones; speed does not depend on the values beyond that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups.plan import kept_of

CONFIGS = {  # embedding dimension, blocks of the four stages
    "swin_t": (96, (2, 2, 6, 2)),
    "swin_s": (96, (2, 2, 18, 2)),
    "swin_b": (128, (2, 2, 18, 2)),
    "swin_l": (192, (2, 2, 18, 2)),
}
MODULES = ("qkv", "proj", "mlp")


def layers(name: str) -> list[tuple[str, int, int]]:
    """Return (module, rows, columns) of every prunable layer, in the model's order."""
    width, depths = CONFIGS[name]
    found = []
    for stage, depth in enumerate(depths):
        d = width * 2**stage
        block = [("qkv", 3 * d, d), ("proj", d, d), ("mlp", 4 * d, d), ("mlp", d, 4 * d)]
        found += block * depth
    return found


def problem(
    name: str, dtype: torch.dtype = torch.float32, scope: str = "module", sparsity: float = 0.55
) -> tuple[list[Tensor], list[int], list[int], list[int]]:
    """Weights, layers, modules and keep for the operators."""
    generator = torch.Generator().manual_seed(0)
    weights, modules = [], []
    for i, (module, rows, columns) in enumerate(layers(name)):
        scale = 0.01 * 1.5 ** (i % 7)
        weights.append((torch.randn(rows, columns, generator=generator) * scale).to(dtype))
        modules.append({"module": MODULES.index(module), "global": 0, "layer": i}[scope])
    totals = [0] * (max(modules) + 1)
    for weight, module_number in zip(weights, modules, strict=True):
        totals[module_number] += weight.numel()
    keep = [kept_of(n, sparsity) for n in totals]
    return weights, list(range(len(weights))), modules, keep
