"""A callback for the Trainer of Lightning.

from dimap.integrations.lightning import PruningCallback

trainer = Trainer(max_epochs=3, callbacks=[PruningCallback(0.5)])
trainer.fit(module, loader)                    # or fit(..., ckpt_path="last.ckpt")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ._pruning import TrainingPruner

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError:  # the same under its older name
        from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["PruningCallback"]


class PruningCallback(TrainingPruner, Callback):
    """Prunes the Trainer's model, and holds what is pruned at zero while it trains.

    sparsity: the share of weights to drop when training begins, as in `dimap.prune`; or a
        `Schedule`, as `CubicSchedule`, by the Trainer's `global_step`, which counts the
        steps of all optimizers.
    masks: parameter name -> bool tensor, True = kept, or a file of `save_masks`: held from the start.
        With both, the model is pruned on from these masks.
    options: of `dimap.select`: `method`, `scope`, `data`, `patterns`, …

    Checkpoints have the masks among the callbacks' state, and training goes on from there. One of a
    training without this callback is pruned when training begins. The norm of the gradients is that of
    those that are used. At the end the masks are let go.

    Raises ValueError where neither is given, and as `dimap.select` and `dimap.hold_masks` when
    training begins.
    """

    _loaded: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, or go on as the checkpoint was; weights and optimizers are loaded by now."""
        masks = None if self._loaded is None else self._loaded["masks"]
        self._loaded = None
        model = trainer.strategy.model or pl_module
        self._begin(model, trainer.optimizers, trainer.global_step, masks)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the gradients of pruned weights before they are clipped."""
        if self._pruning is not None and self._pruning.holding is not None:
            self._pruning.holding.zero_gradients()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Prune on, where the schedule says so."""
        self._reach(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """The masks, for a checkpoint."""
        return {"masks": self._whole_masks()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember the masks of a checkpoint until training begins."""
        self._loaded = state_dict
