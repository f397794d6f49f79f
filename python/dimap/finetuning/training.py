"""One epoch of training, and the judging of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..holding import Holding, hold_masks
from .data import own_images
from .loss import distilled, make_loss, make_mixup, teach
from ._processes import Processes, reduce_loss
from .settings import Settings

# timm's, each a function of the number of steps alone.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")
LOOK = 20  # steps from one look at the loss to the next: a look waits for the device


@dataclass
class Trainer:
    """All that changes during a run.

    forward: `model`, compiled or distributed.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    ema: Any
    holding: Holding
    teacher: nn.Module | None
    classes: int
    processes: Processes
    settings: Settings
    updates: int = 0

    @property
    def judged(self) -> nn.Module:
        """The weights that are judged and kept: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def autocast(self) -> Any:
        """The context of a forward pass."""
        if self.settings.amp == "none":
            return nullcontext()
        dtype = getattr(torch, self.settings.amp)
        return torch.autocast(self.processes.device.type, dtype)

    def train(self, loader: Any, epoch: int, tell: Callable[[float], None]) -> dict[str, float]:
        """One epoch; the mean loss and the last learning rate.

        tell: called after each step with the mean loss so far.

        Raises FloatingPointError where the loss is not finite.
        """
        self.forward.train()
        mixup = make_mixup(self.settings, self.classes, epoch)
        loss_of = make_loss(self.settings, soft=mixup is not None)
        total = torch.zeros((), device=self.processes.device)
        count, seen, lr = 0, 0.0, 0.0
        self.optimizer.zero_grad()
        for number, batches in enumerate(grouped(loader, self.settings.accumulate), 1):
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            for i, (images, labels) in enumerate(batches):
                if mixup is not None:
                    images, labels = mixup(images, labels)
                # Gradients are averaged over processes once a step.
                last = i + 1 == len(batches)
                no_sync = None if last else getattr(self.forward, "no_sync", None)
                with no_sync() if no_sync else nullcontext():
                    loss = self._loss(images, labels, loss_of)
                    self.scaler.scale(loss / len(batches)).backward()
                total += loss.detach() * len(images)
                count += len(images)
            self._step()
            if number == 1 or number % LOOK == 0:
                seen = self._look(total, count, epoch)
            tell(seen)
        self._look(total, count, epoch)
        return {"train_loss": reduce_loss(total, count, self.processes), "lr": lr}

    def _loss(self, images: Tensor, labels: Tensor, loss_of: Callable[..., Tensor]) -> Tensor:
        with self.autocast():
            taught = teach(self.teacher, images) if self.teacher is not None else None
            output = self.forward(images)
        loss = loss_of(output.float(), labels)
        return loss if taught is None else distilled(loss, output, taught, self.settings)

    def _step(self) -> None:
        from timm.utils import dispatch_clip_grad

        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            self.holding.zero_gradients()  # the norm is that of the gradients that are used
            dispatch_clip_grad(
                self.model.parameters(), self.settings.clip_grad, mode=self.settings.clip_mode
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)

    def _look(self, total: Tensor, count: int, epoch: int) -> float:
        loss = float(total) / max(1, count)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss must be finite, got {loss} in epoch {epoch}: a lower lr may help"
            )
        return loss

    @torch.no_grad()
    def judge(self, loader: Any) -> dict[str, float]:
        """Loss and accuracy in percent over all validation images, each counted once."""
        from timm.utils import AverageMeter, accuracy

        model = self.judged.eval()
        k = min(5, self.classes)
        meters = {name: AverageMeter() for name in ("loss", "top1", "topk")}
        left = own_images(loader, self.processes)
        for images, labels in loader:
            if left is not None:
                images, labels = images[:left], labels[:left]
                left -= len(images)
            if not len(images):
                break
            with self.autocast():
                output = model(images).float()
            top1, topk = accuracy(output, labels, topk=(1, k))
            values = (F.cross_entropy(output, labels), top1, topk)
            for meter, value in zip(meters.values(), values, strict=True):
                meter.update(float(value), len(images))
        sums = [float(meter.sum) for meter in meters.values()]
        *sums, count = self.processes.sum([*sums, float(meters["loss"].count)])
        means = {name: s / max(1.0, count) for name, s in zip(meters, sums, strict=True)}
        return {**means, "k": k}


def grouped(loader: Any, size: int) -> Iterator[list[Any]]:
    """Batches in lists of `size`; the last list may be shorter."""
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == size:
            yield batches
            batches = []
    if batches:
        yield batches


def make_trainer(
    model: nn.Module,
    teacher: nn.Module | None,
    masks: Mapping[str, Tensor],
    classes: int,
    batches: int,
    processes: Processes,
    settings: Settings,
) -> Trainer:
    """Everything that training needs, with the masks held from here on.

    Raises ValueError for an optimizer or a schedule that timm does not have.
    """
    from timm.optim import create_optimizer_v2, list_optimizers
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    model.to(processes.device)
    if teacher is not None:
        teacher.to(processes.device).eval().requires_grad_(False)
    if settings.opt not in list_optimizers():
        raise ValueError(f"opt must be an optimizer of timm, got {settings.opt!r}")
    if settings.sched not in SCHEDULES:
        raise ValueError(f"sched must be one of {', '.join(SCHEDULES)}, got {settings.sched!r}")
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        layer_decay=settings.layer_decay,
    )
    holding = hold_masks(model, masks, optimizer)
    scheduler = None
    if settings.epochs:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            # Rising first, then the whole of the schedule: the rate does not jump between them.
            num_epochs=settings.epochs - settings.warmup,
            warmup_prefix=True,
            warmup_epochs=settings.warmup,
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=-(-batches // settings.accumulate),
        )
    forward = processes.wrap(model)
    return Trainer(
        model=model,
        forward=cast(nn.Module, torch.compile(forward)) if settings.compile else forward,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(processes.device.type, enabled=settings.amp == "float16"),
        ema=ModelEmaV3(model, decay=settings.ema) if settings.ema is not None else None,
        holding=holding,
        teacher=teacher,
        classes=classes,
        processes=processes,
        settings=settings,
    )
