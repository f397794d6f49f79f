"""What a run tells: a line for each epoch, and TensorBoard's logs."""

from __future__ import annotations

from typing import Any


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


def tensorboard_writer() -> Any:
    """TensorBoard's writer; ModuleNotFoundError that says what to install where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard logs need the package tensorboard: pip install tensorboard",
            name="tensorboard",
        ) from error
    return SummaryWriter


def write_scalars(board: Any, row: dict[str, Any]) -> None:
    """Write all numbers of a row of the history for TensorBoard, at its epoch."""
    for name, value in row.items():
        if name not in ("epoch", "k"):
            board.add_scalar(name.replace("train_", "train/"), value, row["epoch"])
    board.flush()
