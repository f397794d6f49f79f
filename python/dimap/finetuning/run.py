"""A whole run: everything is checked, then trained, judged and written epoch by epoch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import data as _data, model as _model
from .log import Display, TensorBoard, line, writer_class
from ._processes import join, seed_epoch
from .state import BEST, LAST, Folder, fingerprint
from .training import Trainer, make_trainer
from .settings import make_settings


@dataclass(frozen=True)
class Finetuned:
    """What a run gave.

    best, last: safetensors files with the dense model's names; pruned weights are exactly zero.
    history: a row for each epoch; the first, epoch 0, is of the weights before training.
    """

    best: Path
    last: Path
    best_epoch: int
    best_top1: float
    history: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return {
            "best": str(self.best),
            "last": str(self.last),
            "best_epoch": self.best_epoch,
            "best_top1": self.best_top1,
            "history": self.history,
        }


def finetune(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str] | tuple[Any, Any],
    masks: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    timm_model: str | None = None,
    train_split: str = "train",
    val_split: str = "validation",
    class_map: str | None = None,
    reset_head: bool = False,
    device: str | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    **options: Any,
) -> Finetuned:
    """Train a pruned model; its pruned weights stay exactly zero.

    model: a checkpoint (as for `open_checkpoint`) of a timm model, or an nn.Module that takes
        images [n, channels, height, width] and gives [n, classes]; a module is trained in place.
    data: a folder with train/ and val/, each with a folder of images for each class; a data set of
        timm's factory, "torch/fashion_mnist:ROOT" or "hfds/NAME"; or two data sets (training,
        validation) of PIL images and labels with a `transform`. Nothing is downloaded.
    masks: parameter name -> bool tensor, True = kept, or a file of `save_masks`. None holds the
        zeros of the prunable weights; {} holds nothing.
    out: folder for best.safetensors, last.safetensors, history.json and the state for `resume`.
    teacher: a model like `model`, whose outputs are learned too.
    timm_model: timm's name of the model, where the checkpoint does not say it.
    train_split, val_split, class_map: as timm's factory has them.
    reset_head: a new classifier with as many classes as the data.
    device: "cuda", "cpu", …; a GPU where there is one.
    resume: go on after the last complete epoch in `out`, to the same result as without the
        interruption (bit for bit on the CPU); begins where there is none.
    force: replace another run in `out`.
    options: any field of `Settings`. The defaults are the paper's.

    Several processes of torchrun train together (DistributedDataParallel); each calls this.

    Raises OSError, ValueError, TypeError or ModuleNotFoundError for data that are missing, wrong
    numbers of classes, masks of another model and the like, before any work; FloatingPointError
    where the loss is not finite.
    """
    settings = make_settings(options)
    _need_timm()
    if tensorboard:
        writer_class()
    folder = Folder(Path(out), resume=resume, force=force)
    source = _model.open_model(model, settings, timm_model=timm_model)
    images = _data.open_images(
        data,
        train_split=train_split,
        val_split=val_split,
        class_map=class_map,
        settings=settings,
    )
    if reset_head:
        if images.classes is None:
            raise ValueError("data must say how many classes it has for --reset-head, got none")
        source = _model.open_model(model, settings, timm_model=timm_model, classes=images.classes)
    given = _model.input_of(source, settings)
    classes = _model.outputs_of(source, given)
    if images.classes is not None and images.classes != classes:
        raise ValueError(
            f"{source.name} must have one output for each of the {images.classes} classes of the "
            f"data, got {classes} (--reset-head makes a new classifier)"
        )
    held = _model.masks_of(source, masks)
    taught_by = None
    if teacher is not None:
        tutor = _model.open_model(teacher, settings, timm_model=timm_model)
        if (theirs := _model.outputs_of(tutor, given)) != classes:
            raise ValueError(f"teacher must have {classes} outputs as the model has, got {theirs}")
        taught_by = tutor.model
    with join(device) as processes:
        identity = {
            **settings.to_dict(),
            "processes": processes.world,
            "data": str(data) if not isinstance(data, tuple) else "data sets",
            "train_split": train_split,
            "val_split": val_split,
            "class_map": class_map,
            "masks": fingerprint(held),
            "teacher": fingerprint(taught_by.state_dict()) if taught_by is not None else None,
            "weights": fingerprint(source.model.state_dict()),
        }
        if folder.state is not None:
            if isinstance(model, nn.Module):  # it was trained in place, maybe
                identity["weights"] = folder.state["identity"]["weights"]
            folder.check_same(identity)
        loaders = tuple(
            _data.loader(dataset, given, settings, processes, training=training)
            for dataset, training in ((images.train, True), (images.validation, False))
        )
        if settings.epochs and not len(loaders[0]):
            raise ValueError(
                f"batch_size must be at most the training images of a process, got "
                f"{settings.batch_size} for {len(images.train)} images and {processes.world} processes"
            )
        trainer = make_trainer(
            source.model, taught_by, held, classes, len(loaders[0]), processes, settings
        )
        return _run(trainer, loaders, source.metadata, identity, folder, tensorboard, progress)


def _need_timm() -> None:
    for package in ("timm", "torchvision"):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"fine-tuning needs the package {package}: pip install 'dimap[finetune]'",
                name=package,
            ) from error


def _run(
    trainer: Trainer,
    loaders: tuple[Any, ...],
    metadata: Mapping[str, str],
    identity: Mapping[str, Any],
    folder: Folder,
    tensorboard: bool,
    progress: bool,
) -> Finetuned:
    settings, processes = trainer.settings, trainer.processes
    train, validation = loaders
    history: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    if folder.state is not None:
        history, best = folder.state["history"], folder.state["best"]
        _restore(trainer, folder.state)
    elif processes.first:
        folder.create()
    processes.wait()  # nobody reads what is not yet cleared
    steps = -(-len(train) // settings.accumulate)
    start = len(history)
    board = TensorBoard(
        folder.path / "tensorboard" if tensorboard and processes.first else None, start
    )
    shown = progress and processes.first
    with Display(steps * settings.epochs, trainer.updates, shown=shown) as display:
        if start > 1:
            display.say(f"resumed after epoch {start - 1}")
        for epoch in range(start, settings.epochs + 1):
            began = time.monotonic()
            seed_epoch(settings.seed, epoch, processes.rank)
            row: dict[str, Any] = {"epoch": epoch}
            if epoch:
                _data.set_epoch(train, epoch)
                row |= trainer.train(
                    train,
                    epoch,
                    lambda loss, epoch=epoch: display.step(  # type: ignore[misc]
                        f"epoch {epoch}/{settings.epochs}, loss {loss:.4f}", 1
                    ),
                )
                processes.average_buffers(trainer.judged)
            display.step(f"epoch {epoch}/{settings.epochs}, validation")
            row |= trainer.judge(validation)
            row["seconds"] = time.monotonic() - began
            history.append(row)
            # The latest of equals: it was trained longer.
            improved = best is None or row["top1"] >= best["top1"]
            best = row if improved else best
            if processes.first:
                said = {
                    **metadata,
                    "format": "pt",
                    "epoch": str(epoch),
                    "top1": f"{row['top1']:.4f}",
                }
                if improved:
                    folder.save_weights(BEST, trainer.judged, said)
                folder.save_weights(LAST, trainer.judged, said)
                folder.save_history(identity, history)
                folder.save_state(
                    {
                        **_state(trainer),
                        "identity": dict(identity),
                        "history": history,
                        "best": best,
                    }
                )
                board.write(row)
            display.say(line(row, settings.epochs))
    board.close()
    trainer.holding.remove()
    processes.wait()
    assert best is not None
    return Finetuned(folder.path / BEST, folder.path / LAST, best["epoch"], best["top1"], history)


def _state(trainer: Trainer) -> dict[str, Any]:
    return {
        "updates": trainer.updates,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
    }


def _restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(state["ema"])
    trainer.updates = state["updates"]
    if trainer.scheduler is not None:
        trainer.scheduler.step_update(trainer.updates)  # a function of the number alone
