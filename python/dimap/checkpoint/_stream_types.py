"""What pruning a stream gives, and what it tells while it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..report import Pruned


class Progress(Protocol):
    """What is told of the work as it goes on; `advance` in bytes, by any thread."""

    def step(self, description: str, total: int | None = None) -> None: ...
    def advance(self, amount: int) -> None: ...


class Silent:
    """Tells nobody."""

    def step(self, description: str, total: int | None = None) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass


@dataclass(kw_only=True)
class StreamPruning(Pruned):
    """What was pruned: `dimap.Pruning` without the weights and masks, which lie in files.

    modules, thresholds, scope, normalize, sparsity: as in `dimap.Pruning`.
    shapes, dtypes: of every parameter, "aux" included.
    kept: how many weights the masks keep, of every pruned parameter.
    nonzero: how many are not zero in the output, of every parameter, "aux" included.
    smallest: the smallest kept magnitude of a layer, under each of its parameters; none where
        nothing is kept.
    readings: how often the weights were read to find the cuts.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    kept: dict[str, int]
    nonzero: dict[str, int]
    smallest: dict[str, float] = field(default_factory=dict)
    readings: int = 1
