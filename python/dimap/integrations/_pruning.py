"""What the callbacks share: what they are given, and what a checkpoint keeps of a training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import is_sharded
from ..masks import load_masks
from ..schedule import CubicSchedule, GradualPruning


class TrainingPruner:
    """Arguments of the callbacks, and the pruning that goes on while a training does.

    sparsity: the share of weights to drop when the training begins, as in `dimap.prune`, or a
        `CubicSchedule` whose steps are those of the optimizer that the trainer counts.
    masks: parameter name -> bool tensor, True = kept, or a file of `save_masks`: held from the start.
        One of both is needed; with both, the masks are pruned further.
    options: of `dimap.select`: `method`, `scope`, `data`, `patterns`, …

    Raises ValueError where neither is given.
    """

    def __init__(
        self,
        sparsity: CubicSchedule | float | Mapping[str, float] | None = None,
        *,
        masks: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if sparsity is None and masks is None:
            raise ValueError("sparsity or masks must be given, got neither")
        super().__init__()
        self._sparsity, self._options = sparsity, options
        self._given = load_masks(masks) if isinstance(masks, (str, os.PathLike)) else masks
        self.pruning: GradualPruning | None = None

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool mask, True = kept: what is held now, or was at the end."""
        return {} if self.pruning is None else self.pruning.masks

    def _begin(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        steps: int,
        masks: Mapping[str, Tensor] | None,
    ) -> GradualPruning:
        """Prune and hold; with the masks of a checkpoint, go on after so many steps."""
        if self.pruning is not None:  # of an earlier training
            self.pruning.remove()
        held = self._given if masks is None else masks
        schedule, options = self._sparsity, self._options
        self.pruning = GradualPruning(
            model, optimizer, schedule, masks=held, steps=steps, **options
        )
        return self.pruning

    def _reach(self, steps: int) -> None:
        """The optimizer has done so many steps."""
        while self.pruning is not None and self.pruning.steps < steps:
            self.pruning.step()

    def _whole_masks(self) -> dict[str, Tensor]:
        """The masks as plain tensors; of a sharded model all ranks call it together."""
        return {
            name: mask.full_tensor() if is_sharded([mask]) else mask  # type: ignore[attr-defined]
            for name, mask in self.masks.items()
        }
