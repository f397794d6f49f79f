"""What the callbacks share: what they are given, and the pruning that goes on during a training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import is_sharded
from ..masks import load_masks
from ..schedule import GradualPruning, Schedule


class TrainingPruner:
    """The part of a callback that is not its library's.

    sparsity: the share of weights to drop when training begins, as in `dimap.prune`; or a
        `Schedule`, as `CubicSchedule`, by the optimizer's steps as the trainer counts them.
    masks: parameter name -> bool tensor, True = kept, or a file of `save_masks`: held from the start.
        With both, the model is pruned on from these masks.
    options: of `dimap.select`: `method`, `scope`, `data`, `patterns`, …

    Raises ValueError where neither is given.
    """

    _gradients: bool | Literal["early"] = True  # as in `dimap.hold_masks`

    def __init__(
        self,
        sparsity: Schedule | float | Mapping[str, float] | None = None,
        *,
        masks: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if sparsity is None and masks is None:
            raise ValueError("give a sparsity, masks or both: there is nothing to prune by")
        super().__init__()
        self._sparsity, self._options = sparsity, options
        self._given = load_masks(masks) if isinstance(masks, (str, os.PathLike)) else masks
        self._pruning: GradualPruning | None = None
        self._masks: Mapping[str, Tensor] = {}

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool mask, True = kept: those held now, or at the end of training."""
        return self._masks if self._pruning is None else self._pruning.masks

    def _begin(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        steps: int,
        masks: Mapping[str, Tensor] | None,
    ) -> None:
        """Prune and hold; or hold the masks of the checkpoint that training goes on from.

        steps: of the optimizer that are done already.
        """
        self._end()  # of a training that was interrupted
        first = masks is None and not isinstance(self._sparsity, Schedule)
        self._pruning = GradualPruning(
            model,
            optimizer,
            self._sparsity,
            masks=self._given if masks is None else masks,
            steps=0 if first else steps,
            gradients=self._gradients,
            **self._options,
        )
        self._pruning.steps = steps

    def _reach(self, steps: int) -> None:
        """Prune where the schedule says so: the optimizer has done so many steps."""
        while self._pruning is not None and self._pruning.steps < steps:
            self._pruning.step()

    def _end(self) -> None:
        """Let go. Other weights may have been loaded by now, the best ones: they are pruned too."""
        if self._pruning is not None:
            if self._pruning.holding is not None:
                self._pruning.holding.zero_weights()
            self._masks = dict(self._pruning.masks)
            self._pruning.remove()
            self._pruning = None

    def _whole_masks(self) -> dict[str, Tensor]:
        """The masks as plain tensors; of a sharded model all ranks call it together."""
        masks: dict[str, Any] = dict(self.masks)
        return {n: m.full_tensor() if is_sharded([m]) else m for n, m in masks.items()}
