"""What each module and each layer loses if it alone is pruned: from one survey of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .budgets import ALL, Tables, Weights

SCHEMA, VERSION = "dimap.sensitivity", 1
SPARSITIES = tuple(i / 100 for i in range(101))
BINS = 1 << 14  # 64 to a factor of two: within one, weights hardly differ


@dataclass(frozen=True)
class Curve:
    """Relative Frobenius distortion ``|W - W'| / |W|``, in [0, 1], at each of the sparsities.

    Of a layer its smallest weights are removed; of a module those that DIMAP ranks lowest, and W is all
    of its layers together.
    """

    name: str
    module: str
    weights: int
    distortion: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of a model. JSON schema "dimap.sensitivity", version 1: the fields by their names.

    accuracy: where it was measured: {"sparsities": […], "dense": top-1 in percent, "modules": {name:
        […]}}, if that module alone is pruned.
    """

    modules: tuple[Curve, ...]
    layers: tuple[Curve, ...]
    sparsities: tuple[float, ...] = SPARSITIES
    accuracy: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}


def measure(weights: Weights) -> Sensitivity:
    """The curves of weights whose plan has the scope "module".

    Sums of squares are exact at the edges of 64 bins to each factor of two, and linear within them.
    """
    plan = weights.plan
    tables = Tables(weights, around=ALL, bins=BINS)
    owners = [plan.layer_of_tensors()[head] for head in tables.heads]
    energies = tables.energies()
    sizes = tables.sizes
    layers = [
        Curve(
            layer.name,
            module,
            size,
            tuple(
                _distortion(tables.removed_from(part, round(s * size)), energies[part])
                for s in SPARSITIES
            ),
        )
        for part, ((module, layer), size) in enumerate(zip(owners, sizes, strict=True))
    ]
    names = list(dict.fromkeys(module for module, _ in owners))
    whole, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for (module, _), energy, size in zip(owners, energies, sizes, strict=True):
        whole[module] += energy
        count[module] += size
    curves: dict[str, list[float]] = {name: [] for name in names}
    for s in SPARSITIES:
        lost = dict.fromkeys(names, 0.0)
        for (module, _), (_, removed) in zip(owners, tables.removed(plan.keep(s)), strict=True):
            lost[module] += removed
        for name, curve in curves.items():
            curve.append(_distortion(lost[name], whole[name]))
    modules = [Curve(name, name, count[name], tuple(curve)) for name, curve in curves.items()]
    return Sensitivity(tuple(modules), tuple(layers), notes=plan.notes)


def _distortion(removed: float, energy: float) -> float:
    return math.sqrt(min(1.0, removed / energy)) if energy else 0.0
