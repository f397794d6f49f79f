"""A whole run: everything is checked, then trained, evaluated and written epoch by epoch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .data import make_loader, open_images, set_epoch
from .model import input_of, masks_of, open_model, outputs_of
from .processes import join, seed_epoch
from .settings import Settings
from .state import BEST, LAST, Folder, fingerprint
from .training import Trainer


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
        return {**asdict(self), "best": str(self.best), "last": str(self.last)}


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
    settings = Settings(**options)
    _need("timm", "torchvision", "tqdm")
    if tensorboard:
        _tensorboard_writer()
    folder = Folder(Path(out), resume=resume, force=force)
    images = open_images(
        data,
        train_split=train_split,
        val_split=val_split,
        class_map=class_map,
        settings=settings,
    )
    if reset_head and images.classes is None:
        raise ValueError("data must say how many classes it has for --reset-head, got none")
    new_head = images.classes if reset_head else None
    source = open_model(model, settings, timm_model=timm_model, classes=new_head)
    given = input_of(source, settings)
    classes = outputs_of(source, given)
    if images.classes is not None and images.classes != classes:
        raise ValueError(
            f"{source.name} must have one output for each of the {images.classes} classes of the "
            f"data, got {classes} (--reset-head makes a new classifier)"
        )
    held = masks_of(source, masks)
    teacher_model = None
    if teacher is not None:
        teacher_source = open_model(teacher, settings, timm_model=timm_model)
        if (theirs := outputs_of(teacher_source, given)) != classes:
            raise ValueError(f"teacher must have {classes} outputs as the model has, got {theirs}")
        teacher_model = teacher_source.model
    with join(device) as (ranks, place):
        identity = {
            **settings.to_dict(),
            "processes": ranks.size,
            "data": str(data) if not isinstance(data, tuple) else "data sets",
            "train_split": train_split,
            "val_split": val_split,
            "class_map": class_map,
            "masks": fingerprint(held),
            "teacher": fingerprint(teacher_model.state_dict())
            if teacher_model is not None
            else None,
            "weights": fingerprint(source.model.state_dict()),
        }
        if folder.state is not None:
            if isinstance(model, nn.Module):  # it was trained in place, maybe
                identity["weights"] = folder.state["identity"]["weights"]
            folder.check_same(identity)
        train = make_loader(images.train, given, settings, ranks, place, training=True)
        validation = make_loader(images.validation, given, settings, ranks, place, training=False)
        if settings.epochs and not len(train):
            raise ValueError(
                f"batch_size must be at most the training images of a process, got "
                f"{settings.batch_size} for {len(images.train)} images and {ranks.size} processes"
            )
        trainer = Trainer(
            source.model, teacher_model, held, classes, len(train), ranks, place, settings
        )
        board = folder.path / "tensorboard" if tensorboard and ranks.rank == 0 else None
        shown = progress and ranks.rank == 0
        history = _run(
            trainer, train, validation, source.metadata, identity, folder, board, shown=shown
        )
    best = _best(history)
    return Finetuned(folder.path / BEST, folder.path / LAST, best["epoch"], best["top1"], history)


def _need(*packages: str) -> None:
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"fine-tuning needs the package {package}: pip install 'dimap[finetune]'",
                name=package,
            ) from error


def _best(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the highest accuracy; the latest of equals, which was trained longer."""
    return max(reversed(history), key=lambda row: row["top1"])


def _run(
    trainer: Trainer,
    train: Any,
    validation: Any,
    metadata: Mapping[str, str],
    identity: Mapping[str, Any],
    folder: Folder,
    board_folder: Path | None,
    *,
    shown: bool,
) -> list[dict[str, Any]]:
    """All epochs that are left; the history of the whole run.

    metadata: for the files of weights. identity: what a run must share with the one it resumes.
    shown: show a line for each epoch on stderr, and a bar where that is a terminal.
    """
    from tqdm import tqdm

    settings, ranks = trainer.settings, trainer.ranks
    history: list[dict[str, Any]] = []
    if folder.state is not None:
        history = folder.state["history"]
        trainer.load_state_dict(folder.state)
    elif ranks.rank == 0:
        folder.create()
    ranks.gather(None)  # nobody reads what is not yet cleared
    start = len(history)
    say = partial(tqdm.write, file=sys.stderr) if shown else lambda _: None
    if start > 1:
        say(f"resumed after epoch {start - 1}")
    steps = settings.epochs * -(-len(train) // settings.accumulate)
    # What an interrupted run wrote for TensorBoard beyond its last checkpoint is hidden.
    board = board_folder and _tensorboard_writer()(str(board_folder), purge_step=start)
    with tqdm(
        total=steps, initial=trainer.updates, file=sys.stderr, leave=False,
        disable=None if shown else True,  # None: where stderr is no terminal
    ) as bar:  # fmt: skip
        for epoch in range(start, settings.epochs + 1):
            began = time.monotonic()
            name = f"epoch {epoch}/{settings.epochs}"
            seed_epoch(settings.seed, epoch, ranks.rank)
            row: dict[str, Any] = {"epoch": epoch}
            if epoch:

                def tell(loss: float, name: str = name) -> None:
                    bar.set_description_str(f"{name}, loss {loss:.4f}", refresh=False)
                    bar.update()

                set_epoch(train, epoch)
                row |= trainer.train(train, epoch, tell)
                trainer.average_buffers()
            bar.set_description_str(f"{name}, validation")
            row |= trainer.evaluate(validation)
            row["seconds"] = time.monotonic() - began
            history.append(row)
            if ranks.rank == 0:
                notes = {"format": "pt", "epoch": str(epoch), "top1": f"{row['top1']:.4f}"}
                folder.save_epoch(
                    trainer.evaluated,
                    {**metadata, **notes},
                    identity,
                    history,
                    trainer.state_dict(),
                    best=_best(history) is row,
                )
                if board:
                    _write_scalars(board, row)
            say(_line(row, settings.epochs))
    if board:
        board.close()
    trainer.holding.remove()
    ranks.gather(None)
    return history


def _line(row: dict[str, Any], epochs: int) -> str:
    """A row of the history in words."""
    said = f"validation loss {row['loss']:.4f}, top-1 {row['top1']:.2f} %"
    said += f", top-{row['k']} {row['topk']:.2f} %"
    if "train_loss" in row:
        said = f"loss {row['train_loss']:.4f}, {said}, lr {row['lr']:.2e}"
    return f"epoch {row['epoch']}/{epochs}, {said}, {row['seconds']:.0f} s"


def _tensorboard_writer() -> Any:
    """TensorBoard's writer; ModuleNotFoundError that says what to install where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard logs need the package tensorboard: pip install tensorboard",
            name="tensorboard",
        ) from error
    return SummaryWriter


def _write_scalars(board: Any, row: dict[str, Any]) -> None:
    """Write all numbers of a row of the history for TensorBoard, at its epoch."""
    for name, value in row.items():
        if name not in ("epoch", "k"):
            board.add_scalar(name.replace("train_", "train/"), value, row["epoch"])
    board.flush()
