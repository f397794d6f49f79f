"""One epoch of training, and the evaluation of a model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from .._errors import near
from ..distributed.ranks import Ranks
from ..holding import hold_masks
from .settings import Settings

# Settings that have timm's own names.
OPTIMIZER = ("opt", "lr", "weight_decay", "momentum", "layer_decay")
SCHEDULE = ("sched", "warmup_lr", "min_lr")

LOOK = 20  # steps from one look at the loss to the next: a look waits for the device


class Trainer:
    """All that changes during a run. Masks are held from here on, until `holding.remove()`.

    masks: parameter name -> bool tensor, True = kept.
    classes: outputs of the model. batches: in one epoch of this process.

    Raises ValueError for an optimizer that timm does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        masks: Mapping[str, Tensor],
        classes: int,
        batches: int,
        ranks: Ranks,
        device: torch.device,
        settings: Settings,
    ) -> None:
        from timm.optim import create_optimizer_v2, list_optimizers
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        if settings.opt not in (known := cast(list[str], list_optimizers())):
            raise ValueError(
                f"opt must be an optimizer of timm, got {settings.opt!r}{near(settings.opt, known)}"
            )
        self.model, self.teacher = model.to(device), teacher
        self.classes, self.ranks, self.device = classes, ranks, device
        self.settings = settings
        self.updates = 0  # steps of the optimizer so far
        if teacher is not None:
            teacher.to(device).eval().requires_grad_(False)
        self.optimizer = create_optimizer_v2(model, **settings.named(*OPTIMIZER))
        self.holding = hold_masks(model, masks, self.optimizer)
        self.scheduler: Any = None
        if settings.epochs:
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer,
                **settings.named(*SCHEDULE),
                # Rising first, then the whole of the schedule: the rate does not jump between them.
                num_epochs=settings.epochs - settings.warmup,
                warmup_prefix=True,
                warmup_epochs=settings.warmup,
                step_on_epochs=False,
                updates_per_epoch=-(-batches // settings.accumulate),
            )
        forward: nn.Module = model
        if ranks.size > 1:  # gradients are averaged over all processes
            ids = [device] if device.type == "cuda" else None
            forward = DistributedDataParallel(model, device_ids=ids)
        self.forward = cast(nn.Module, torch.compile(forward)) if settings.compile else forward
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self.ema = ModelEmaV3(model, decay=settings.ema) if settings.ema is not None else None

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and saved: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after a complete epoch."""
        return {
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.updates = state["updates"]
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)  # a function of the number alone

    def train(self, loader: Any, epoch: int, tell: Callable[[float], None]) -> dict[str, float]:
        """One epoch; the mean loss and the last learning rate.

        tell: called after each step with the mean loss so far.

        Raises FloatingPointError where the loss is not finite.
        """
        from timm.utils import distribute_bn

        for each in (loader.dataset, getattr(loader, "sampler", None)):
            if set_epoch := getattr(each, "set_epoch", None):
                set_epoch(epoch)
        self.forward.train()
        mixup = make_mixup(self.settings, self.classes, epoch)
        loss_of = make_loss(self.settings, soft=mixup is not None)
        total = torch.zeros((), device=self.device)
        count, seen, lr = 0, 0.0, 0.0
        self.optimizer.zero_grad()
        batches = iter(loader)
        steps = iter(lambda: list(islice(batches, self.settings.accumulate)), [])
        for number, step in enumerate(steps, 1):
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            for i, (images, labels) in enumerate(step):
                if mixup is not None:
                    images, labels = mixup(images, labels)
                # Gradients are averaged over processes once a step.
                last = i + 1 == len(step)
                no_sync = None if last else getattr(self.forward, "no_sync", None)
                with no_sync() if no_sync else nullcontext():
                    loss = self._loss(images, labels, loss_of)
                    self.scaler.scale(loss / len(step)).backward()
                total += loss.detach() * len(images)
                count += len(images)
            self._step()
            if number == 1 or number % LOOK == 0:
                seen = _finite_mean(total, count, epoch)
            tell(seen)
        _finite_mean(total, count, epoch)
        if self.ranks.size > 1:
            distribute_bn(self.evaluated, self.ranks.size, reduce=True)
        return {"train_loss": self._means([float(total)], count)[0], "lr": lr}

    def _autocast(self) -> Any:
        if self.settings.amp == "none":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.amp))

    def _loss(self, images: Tensor, labels: Tensor, loss_of: Callable[..., Tensor]) -> Tensor:
        teacher_logits = None
        with self._autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(images)
            output = self.forward(images)
        loss = loss_of(output.float(), labels)
        if teacher_logits is None:
            return loss
        return distilled(loss, output, teacher_logits, self.settings)

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

    @torch.no_grad()
    def evaluate(self, loader: Any) -> dict[str, float]:
        """Loss and accuracy in percent over all validation images, each counted once."""
        from timm.utils import accuracy

        model = self.evaluated.eval()
        k = min(5, self.classes)
        sums = torch.zeros(4, dtype=torch.float64)  # of loss, top-1, top-k, and the images
        left: float = math.inf  # images of this process, without those that fill up the last batch
        if not isinstance(loader.dataset, IterableDataset):
            left = (len(loader.dataset) - self.ranks.rank + self.ranks.size - 1) // self.ranks.size
        for images, labels in loader:
            count = min(len(images), left)
            images, labels = images[: int(count)], labels[: int(count)]
            left -= count
            if not count:
                break
            with self._autocast():
                output = model(images).float()
            means = F.cross_entropy(output, labels), *accuracy(output, labels, topk=(1, k))
            sums += len(images) * torch.tensor([*map(float, means), 1.0], dtype=torch.float64)
        *totals, count = sums.tolist()
        loss, top1, topk = self._means(totals, count)
        return {"loss": loss, "top1": top1, "topk": topk, "k": k}

    def _means(self, totals: list[float], count: float) -> list[float]:
        """Totals of this many images, as means over the images of all processes."""
        sums = self.ranks.sum(torch.tensor([*totals, count], dtype=torch.float64))
        return list((sums[:-1] / sums[-1].clamp_min(1)).tolist())


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed all that is random for one epoch.

    Every epoch begins from its own number alone, so that a resumed run draws what one that was
    never interrupted does; and each process draws its own.
    """
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def _finite_mean(total: Tensor, count: int, epoch: int) -> float:
    loss = float(total) / max(1, count)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss must be finite, got {loss} in epoch {epoch}: a lower lr may help"
        )
    return loss


def make_mixup(settings: Settings, classes: int, epoch: int) -> Any:
    """timm's Mixup, or None where images stay apart."""
    from timm.data import Mixup

    off = settings.mixup_off_epoch and epoch > settings.mixup_off_epoch
    if not settings.mixes or off:
        return None
    return Mixup(
        settings.mixup,
        settings.cutmix,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        mode=settings.mixup_mode,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )


def make_loss(settings: Settings, *, soft: bool) -> nn.Module:
    """The loss of outputs [n, classes] and labels [n], or shares [n, classes] where `soft`."""
    from timm.loss import BinaryCrossEntropy

    smoothing = 0.0 if soft else settings.smoothing  # Mixup has smoothed the shares
    if settings.bce:
        return cast(nn.Module, BinaryCrossEntropy(smoothing=smoothing))
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def distilled(loss: Tensor, output: Tensor, teacher_logits: Tensor, settings: Settings) -> Tensor:
    """The loss, with a share of the divergence from the teacher's logits [n, classes]."""
    t, alpha = settings.distill_temperature, settings.distill_alpha
    divergence = F.kl_div(
        F.log_softmax(output.float() / t, dim=1),
        F.log_softmax(teacher_logits.float() / t, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * loss + alpha * t * t * divergence
