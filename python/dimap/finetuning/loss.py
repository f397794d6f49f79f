"""What is minimised: timm's losses, mixed images, and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import Settings

Loss = Callable[[Tensor, Tensor], Tensor]


def make_mixup(settings: Settings, classes: int, epoch: int) -> Any:
    """timm's Mixup, or None where images stay apart."""
    from timm.data import Mixup

    off = settings.mixup_off_epoch and epoch > settings.mixup_off_epoch
    if not settings.mixes or off:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        mode=settings.mixup_mode,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )


def make_loss(settings: Settings, *, soft: bool) -> Loss:
    """timm's loss of outputs [n, classes] and labels [n], or shares [n, classes] where `soft`."""
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if settings.bce:
        made: nn.Module = BinaryCrossEntropy(smoothing=0.0 if soft else settings.smoothing)
    elif soft:
        made = SoftTargetCrossEntropy()
    elif settings.smoothing:
        made = LabelSmoothingCrossEntropy(settings.smoothing)
    else:
        made = nn.CrossEntropyLoss()
    return made


def distilled(loss: Tensor, output: Tensor, taught: Tensor, settings: Settings) -> Tensor:
    """The loss, with a share of the divergence from the teacher's output [n, classes]."""
    t, alpha = settings.distill_temperature, settings.distill_alpha
    divergence = F.kl_div(
        F.log_softmax(output.float() / t, dim=1),
        F.log_softmax(taught.float() / t, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * loss + alpha * t * t * divergence


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor) -> Tensor:
    """What the teacher says of images."""
    taught: Tensor = teacher(images)
    return taught
