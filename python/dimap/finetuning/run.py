"""A whole run: everything is checked, then trained, evaluated and written epoch by epoch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.launch import group_of
from ..distributed.ranks import Ranks
from ..groups import Choice, Patterns, choose
from .data import make_loader, open_images
from .model import input_of, masks_of, open_model, outputs_of
from .settings import Settings
from .state import BEST, LAST, Folder, fingerprint
from .training import Trainer, seed_epoch

QUIET = 60.0  # seconds from one line to the next where there is no bar


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
    device: str | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
    **options: Any,
) -> Finetuned:
    """Train a pruned model; its pruned weights stay exactly zero.

    model: a checkpoint (as for `open_checkpoint`) of a timm model, or an nn.Module that takes
        images [n, channels, height, width] and gives [n, classes]; a module is trained in place.
    data: a folder with train/ and val/, each with a folder of images for each class; a data set of
        timm's factory, "torch/fashion_mnist:ROOT" or "hfds/NAME"; or two data sets (training,
        validation) of PIL images and labels with a `transform`. Nothing is downloaded.
    masks: parameter name -> bool tensor, True = kept, or a file of `save_masks`; they must drop the
        zeros of the prunable weights and no others. None holds these zeros; {} holds nothing.
    out: folder for best.safetensors, last.safetensors, history.json and the state for `resume`.
    teacher: a model like `model`, whose outputs are learned too.
    device: "cuda", "cpu", …; a GPU where there is one.
    resume: go on after the last complete epoch in `out`, to the same result as without the
        interruption (bit for bit on the CPU); begins where there is no `out` yet.
    force: replace another run in `out`.
    patterns, family, ignore: which weights may be pruned, as in `dimap.find_modules`.
    options: any field of `Settings`. The defaults are the paper's. Among them:
        masks_from_zeros (in place of what `masks` say of their weights, hold the zeros these have),
        allow_mask_change (hold `masks` although they revive zeros of the model or prune more of it),
        timm_model (timm's name of the model, where the checkpoint does not say it), train_split,
        val_split, class_map (as timm's factory has them) and reset_head (a new classifier with as
        many classes as the data).

    Several processes of torchrun train together (DistributedDataParallel); each calls this.

    Raises OSError, ValueError, TypeError or ModuleNotFoundError for data that are missing, wrong
    numbers of classes, masks of another model and the like, before any work; ValueError for an image
    that cannot be read, and FloatingPointError where the loss is not finite, when they come up.
    """
    settings = Settings(**options)
    for package in ("timm", "torchvision", "tqdm"):
        need(package)
    if tensorboard:
        need("tensorboard", "torch.utils.tensorboard")
    folder = Folder(Path(out), resume=resume, force=force)
    train_images, validation_images, known = open_images(data, settings)
    if settings.reset_head and known is None:
        raise ValueError("data must say how many classes it has for --reset-head, got none")
    source = open_model(model, settings, known if settings.reset_head else None)
    given = input_of(source, settings)
    classes = outputs_of(source, given["input_size"])
    if known is not None and known != classes:
        raise ValueError(
            f"{source.name} must have one output for each of the {known} classes of the data, "
            f"got {classes} (--reset-head makes a new classifier)"
        )
    held = masks_of(source, masks, settings, choose(patterns, family, ignore))
    taught = None
    if teacher is not None:
        teaching = open_model(teacher, settings)
        if (theirs := outputs_of(teaching, given["input_size"])) != classes:
            raise ValueError(f"teacher must have {classes} outputs as the model has, got {theirs}")
        taught = teaching.model
    with joined(device) as (ranks, place):
        identity = {
            **settings.model_dump(mode="json"),
            "processes": ranks.size,
            "data": str(data) if not isinstance(data, tuple) else "data sets",
            "masks": fingerprint(held),
            "teacher": None if taught is None else fingerprint(taught.state_dict()),
            "weights": fingerprint(source.model.state_dict()),
        }
        if folder.state and isinstance(model, nn.Module):  # it was trained in place, maybe
            identity["weights"] = folder.state["identity"]["weights"]
        folder.check_same(identity)
        train, validation = (
            make_loader(images, given, settings, ranks, place, training=training)
            for images, training in ((train_images, True), (validation_images, False))
        )
        if settings.epochs and not len(train):
            raise ValueError(
                f"batch_size must be at most {len(train_images) // ranks.size}, the training images "
                f"of each process, got {settings.batch_size}"
            )
        trainer = Trainer(source.model, taught, held, classes, len(train), ranks, place, settings)
        shown, board = (wanted and ranks.rank == 0 for wanted in (progress, tensorboard))
        history = _run(
            trainer, train, validation, source.metadata, identity, folder, shown=shown, board=board
        )
    best = _best(history)
    return Finetuned(folder.path / BEST, folder.path / LAST, best["epoch"], best["top1"], history)


def need(package: str, module: str | None = None) -> None:
    try:
        import_module(module or package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"fine-tuning needs the package {package}: pip install 'torch-dimap[finetune]', or "
            "'.[finetune]' from a checkout",
            name=package,
        ) from error


@contextmanager
def joined(device: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of torchrun, or this one alone; and the device of this process."""
    from timm.utils.distributed import init_distributed_device_so

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, got {name!r}") from error
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} needs a GPU, and torch sees none")
    given = dist.is_available() and dist.is_initialized()  # the caller's group stays
    place = torch.device(name if given else init_distributed_device_so(name)["device"])
    grouped = dist.is_available() and dist.is_initialized()
    # Not entered as a context: DistributedDataParallel has exchanges of its own, in which an error
    # could not be passed on; the launcher ends the others.
    try:
        yield group_of() if grouped else Ranks(), place
    finally:
        if grouped and not given:
            dist.destroy_process_group()


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
    *,
    shown: bool,
    board: bool,
) -> list[dict[str, Any]]:
    """All epochs that are left; the history of the whole run.

    metadata: for the files of weights. identity: what a run must share with the one it resumes.
    shown: show a line for each epoch on stderr, and a bar where that is a terminal, else a line from time to
    time (`QUIET`). board: write logs for TensorBoard.
    """
    from tqdm import tqdm

    settings, ranks = trainer.settings, trainer.ranks
    history: list[dict[str, Any]] = folder.state["history"] if folder.state else []
    if folder.state:
        trainer.load_state_dict(folder.state)
    elif ranks.rank == 0:
        folder.clear()
    ranks.gather(None)  # nobody reads what is not yet cleared
    start = len(history)
    say = partial(tqdm.write, file=sys.stderr) if shown else lambda _: None
    if start > 1:
        say(f"resumed after epoch {start - 1}")
    writing: Any = nullcontext()
    if board:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond its last checkpoint is hidden.
        writing = SummaryWriter(str(folder.path / "tensorboard"), purge_step=start)
    steps = settings.epochs * -(-len(train) // settings.accumulate)
    progress = tqdm(
        total=steps, initial=trainer.updates, file=sys.stderr, leave=False,
        disable=None if shown else True,  # None: where stderr is no terminal
    )  # fmt: skip
    with progress as bar, writing as writer:
        told = time.monotonic()

        def tell(loss: float) -> None:
            nonlocal told
            bar.set_description_str(f"{name}, loss {loss:.4f}", refresh=False)
            bar.update()
            if bar.disable and time.monotonic() - told > QUIET:
                told = time.monotonic()
                say(f"{name}, step {trainer.updates} of {steps}, loss {loss:.4f}")

        for epoch in range(start, settings.epochs + 1):
            began, name = time.monotonic(), f"epoch {epoch}/{settings.epochs}"
            seed_epoch(settings.seed, epoch, ranks.rank)
            row: dict[str, Any] = {"epoch": epoch}
            if epoch:
                row |= trainer.train(train, epoch, tell)
            bar.set_description_str(f"{name}, validation")
            row |= trainer.evaluate(validation)
            row["seconds"] = time.monotonic() - began
            history.append(row)
            if ranks.rank == 0:
                folder.save_epoch(
                    trainer.evaluated.state_dict(),
                    {**metadata, "format": "pt", "epoch": str(epoch), "top1": f"{row['top1']:.4f}"},
                    {**trainer.state_dict(), "identity": identity, "history": history},
                    best=_best(history) is row,
                )
            for key, value in row.items() if board else ():
                if key not in ("epoch", "k"):
                    writer.add_scalar(key.replace("train_", "train/"), value, epoch)
            text = f"validation loss {row['loss']:.4f}, top-1 {row['top1']:.2f} %"
            text += f", top-{row['k']} {row['topk']:.2f} %"
            if epoch:
                text = f"loss {row['train_loss']:.4f}, {text}, lr {row['lr']:.2e}"
            say(f"{name}, {text}, {row['seconds']:.0f} s")
    trainer.holding.remove()
    ranks.gather(None)
    return history
