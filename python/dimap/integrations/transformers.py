"""A callback for the Trainer of Hugging Face transformers.

    from dimap.integrations.transformers import PruningCallback

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[PruningCallback(0.5)])
    trainer.train()                                # or train(resume_from_checkpoint=True)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..masks import load_masks, save_masks, zero_dropped
from ..holding import whole_weights
from ._pruning import TrainingPruner

__all__ = ["MASKS", "PruningCallback"]

MASKS = "dimap_masks.safetensors"  # in every checkpoint


class PruningCallback(TrainingPruner, TrainerCallback):  # type: ignore[misc]
    """Prunes the model when training begins, or by a schedule, and holds what is pruned at zero.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune, or go on with the masks of the checkpoint that is resumed."""
