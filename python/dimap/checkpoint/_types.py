"""What every form of checkpoint offers: `Checkpoint` for reading, `Writer` for writing."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .._files import replacing

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(ABC):
    """Names, shapes and dtypes of a checkpoint, and its tensors one at a time.

    Attributes:
        path: as it was given.
        form: "safetensors", "folder", "pickled" or "timm".
        tensors: name -> tensor on the meta device, in the order of the file; never empty.
        metadata: strings stored beside the tensors of a safetensors file.
        notes: what the user should know about this checkpoint, one sentence each.
    """

    # File name endings that an output may have; a folder may have any name.
    endings: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | os.PathLike[str],
        form: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = os.fspath(path)
        self.form = form
        self.tensors = dict(tensors)
        self.metadata = dict(metadata)
        self.notes: list[str] = []
        if not tensors:
            raise ValueError(f"{self.path} must hold at least one tensor, got none")

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU. Writing into it changes no file."""

    @contextmanager
    def create(self, out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Writer]:
        """Write a checkpoint of the same form to `out`: complete when the block ends, or not there.

        A pickled or timm checkpoint can be written as .safetensors too.
        force: replace an `out` that is there already (a folder only if it holds a checkpoint).

        Raises FileExistsError, or another OSError where `out` cannot be written; ValueError where
        `out` is the checkpoint that is read, lies inside it or around it, or has the wrong ending.
        """
        target = Path(out)
        folder = self.form == "folder"
        self._check_apart(target)
        if self.endings and target.suffix not in self.endings and not target.is_dir():
            raise ValueError(
                f"the output for {self.path} must end in {' or '.join(self.endings)}, got {target}"
            )
        if folder and force and target.is_dir():
            _check_replaceable(target)
        with replacing(target, folder=folder, force=force) as temporary:
            writer = self._writer(temporary, target.suffix)
            yield writer
            writer.finish()

    @abstractmethod
    def _writer(self, temporary: Path, ending: str) -> Writer:
        """A writer into `temporary`, an empty file or folder that is to have this ending."""

    def _check_apart(self, out: Path) -> None:
        if self.form == "timm":
            return
        source, target = Path(self.path).resolve(), out.resolve()
        if source == target or (out.exists() and out.samefile(source)):
            raise ValueError(f"the output must not be the checkpoint that is read, got {out}")
        if source in target.parents or target in source.parents:
            raise ValueError(f"the output must lie apart from {self.path}, got {out}")

    def close(self) -> None:  # noqa: B027 - optional: only some forms hold files open
        """Let go of the files; tensors that were read stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer(ABC):
    """Takes the tensors of a new checkpoint, one by one, in the order of `names`.

    A tensor must have the shape and dtype of the one that it stands for.

    pack: names of those that a file made from tensors in memory stores as bits and values.
    """

    pack: Collection[str] = ()

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = tuple(tensors)
        self._tensors = tensors
        self._done = 0

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        due = self.names[self._done] if self._done < len(self.names) else None
        if name != due:
            raise ValueError(f"tensors must be written in order, {due} next, got {name}")
        want = self._tensors[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"{name} must be {want.dtype} {list(want.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        self._write(name, tensor.detach())
        self._done += 1

    @abstractmethod
    def _write(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None:
        """Complete the files; called by `Checkpoint.create`."""
        if self._done < len(self.names):
            raise ValueError(f"every tensor must be written, got none for {self.names[self._done]}")


def shorten(items: Iterable[str], most: int = 8) -> str:
    """The first few of many names, for an error message."""
    texts = list(items)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced, thus removed, only if it plainly is an earlier output."""
    if not any((folder / name).exists() for name in (SINGLE, INDEX)) and any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, f"is not replaced: it is a folder without {SINGLE}", str(folder)
        )
