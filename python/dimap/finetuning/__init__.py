"""Fine-tuning with masks held: `dimap.finetune` and the command `dimap finetune`.

    dimap.finetune("pruned.safetensors", "imagenet/", "masks.safetensors", out="run")

Data, augmentation, optimizers, schedules, losses, averages and metrics are timm's.
"""

from __future__ import annotations

from .run import Finetuned, finetune
from .settings import Settings

__all__ = ["Finetuned", "Settings", "finetune"]
