"""What pruning a stream gives, and what it tells while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ..groups import Layer
from ..groups._plan import Normalize
from ..groups._scopes import Scope

if TYPE_CHECKING:
    from ..report import Report


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


@dataclass
class StreamPruning:
    """What was pruned: `dimap.Pruning` without the weights and masks, which lie in files.

    modules, thresholds, scope, normalize, sparsity: as in `dimap.Pruning`.
    shapes, dtypes: of every parameter, "aux" included.
    kept: how many weights the masks keep, of every pruned parameter.
    nonzero: how many are not zero in the output, of every parameter, "aux" included.
    smallest: the smallest kept magnitude of a layer, under each of its parameters; none where
        nothing is kept.
    readings: how often the weights were read to find the cuts.
    """

    modules: dict[str, list[Layer]]
    thresholds: dict[str, float]
    scope: Scope
    normalize: Normalize
    sparsity: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    kept: dict[str, int]
    nonzero: dict[str, int]
    smallest: dict[str, float] = field(default_factory=dict)
    readings: int = 1

    def report(
        self, model: nn.Module | None = None, input_size: int | Sequence[int] | None = None
    ) -> Report:
        """Tables of what is left; with `model`, FLOPs too (see `dimap.report.build_report`)."""
        from ..report import build_report

        return build_report(self, model, input_size)
