"""What a run shows: a bar with the time left, a line an epoch, and TensorBoard's logs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Shows a run on stderr: lines always, the bar where stderr is a terminal.

    total: steps of the whole run. shown: whether this process speaks at all.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self.shown = shown
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal and not console.is_dumb_terminal),
        )
        self._task = self._progress.add_task("", total=total or None, completed=done)

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self.shown:
            self._progress.console.print(text, soft_wrap=True, markup=False)

    def step(self, text: str, advance: int = 0) -> None:
        """What is going on, and how many more steps are done."""
        self._progress.update(self._task, description=text, advance=advance)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def line(row: dict[str, Any], epochs: int) -> str:
    """A row of the history in words."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    if "train_loss" in row:
        parts.append(f"loss {row['train_loss']:.4f}")
    parts.append(f"validation loss {row['loss']:.4f}")
    parts.append(f"top-1 {row['top1']:.2f} %")
    parts.append(f"top-{row['k']} {row['topk']:.2f} %")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.2e}")
    parts.append(f"{row['seconds']:.0f} s")
    return ", ".join(parts)


class TensorBoard:
    """Scalars for TensorBoard; does nothing where `folder` is None."""

    def __init__(self, folder: Path | None, first_epoch: int) -> None:
        self._writer: Any = None
        if folder is not None:
            # What an interrupted run wrote beyond its last checkpoint is hidden.
            self._writer = writer_class()(str(folder), purge_step=first_epoch)

    def write(self, row: dict[str, Any]) -> None:
        """All numbers of a row of the history, at its epoch."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name not in ("epoch", "k"):
                self._writer.add_scalar(name.replace("train_", "train/"), value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


def writer_class() -> Any:
    """TensorBoard's writer; ModuleNotFoundError that says what to install where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard logs need the package tensorboard: pip install tensorboard",
            name="tensorboard",
        ) from error
    return SummaryWriter
