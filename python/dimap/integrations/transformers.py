"""A callback for the Trainer of Hugging Face transformers.

from dimap.integrations.transformers import PruningCallback

trainer = Trainer(model, arguments, train_dataset=data, callbacks=[PruningCallback(0.5)])
trainer.train()                                # or train(resume_from_checkpoint=True)
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..masks import load_masks, save_masks
from ._pruning import TrainingPruner

__all__ = ["MASKS", "PruningCallback"]

MASKS = "dimap_masks.safetensors"  # in every checkpoint that the Trainer writes


class PruningCallback(TrainingPruner, TrainerCallback):
    """Prunes the Trainer's model, and holds what is pruned at zero while it trains.

    sparsity: the share of weights to drop when training begins, as in `dimap.prune`; or a
        `Schedule`, as `CubicSchedule`, by the Trainer's `global_step`.
    masks: parameter name -> bool tensor, True = kept, or a file of `save_masks`: held from the start.
        With both, the model is pruned on from these masks.
    options: of `dimap.select`: `method`, `scope`, `data`, `patterns`, …

    Each checkpoint has the masks in `MASKS`, from which a resumed training goes on; one from
    elsewhere than the Trainer's `output_dir` needs them as `masks`. The norm of the gradients is that
    of those that are used. At the end the masks are applied once more, to the best model where that was
    loaded, and let go.

    Raises ValueError where neither is given, and as `dimap.select` and `dimap.hold_masks` when
    training begins; FileNotFoundError there for a checkpoint without masks.
    """

    _gradients = "early"  # the Trainer clips before it calls anybody

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **having: Any
    ) -> None:
        """Prune, or go on as the checkpoint was."""
        masks = self._saved(args, state.global_step) if state.global_step else None
        self._begin(having["model"], having["optimizer"], state.global_step, masks)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Prune on, where the schedule says so."""
        self._reach(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the masks into the checkpoint."""
        masks = self._whole_masks()
        path = _checkpoint(args, state.global_step) / MASKS
        if args.should_save and path.parent.is_dir():
            save_masks(masks, path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Apply the masks once more, and let go."""
        self._end()

    def _saved(self, args: TrainingArguments, steps: int) -> Mapping[str, Tensor] | None:
        folders = [_checkpoint(args, steps)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for path in (folder / MASKS for folder in folders):
            if path.is_file():
                return load_masks(path)
        if self._given is None:
            problem = "must be there to go on with pruning; other masks may be given as masks=..."
            raise FileNotFoundError(errno.ENOENT, problem, str(folders[0] / MASKS))
        return None


def _checkpoint(args: TrainingArguments, steps: int) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{steps}"
