"""What every form of checkpoint offers: `Checkpoint` for reading, `Writer` for writing."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .._files import replacing
from ..groups import Choice, Grouping, Layer, group, is_parameter
from .header import Spec

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Progress(Protocol):
    """What is told of the work as it goes on; `advance` in bytes."""

    def step(self, description: str, total: int | None = None) -> None: ...
    def advance(self, amount: int) -> None: ...


class Silent:
    """Progress that tells nobody."""

    def step(self, description: str, total: int | None = None) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass


class Checkpoint(ABC):
    """Names, shapes and dtypes of a checkpoint, and its tensors one at a time.

    Attributes:
        path: as it was given.
        form: "safetensors", "folder", "pickled" or "timm".
        tensors: name -> `Spec` (dtype, shape, nbytes), in the order of the file; never empty.
        metadata: strings stored beside the tensors of a safetensors file.
        notes: what the user should know about this checkpoint, one sentence each.
        choice: how its tensors are grouped, where that is not left to the known families.
    """

    # File name endings that an output may have; a folder may have any name.
    endings: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | os.PathLike[str],
        form: str,
        tensors: Mapping[str, Spec],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = os.fspath(path)
        self.form = form
        self.tensors = dict(tensors)
        self.metadata = dict(metadata)
        self.notes: list[str] = []
        self.choice = Choice()
        if not tensors:
            raise ValueError(f"{self.path} must hold at least one tensor, got none")

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU. Writing into it changes no file."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `dimap.find_modules` takes for parameters, by name."""
        return {
            name: spec.shape
            for name, spec in self.tensors.items()
            if is_parameter(name, spec.dtype.is_floating_point)
        }

    def find_modules(self) -> dict[str, list[Layer]]:
        """`dimap.find_modules` on the names and shapes, by `choice`."""
        return self.group().modules

    def group(self) -> Grouping:
        """Modules, families and notes, by `choice`."""
        return group(self.shapes(), self.choice)

    @contextmanager
    def create(self, out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Writer]:
        """Write a checkpoint of the same form to `out`: complete when the block ends, or not there.

        A pickled or timm checkpoint can be written as .safetensors too.
        force: replace an `out` that is there already (a folder only if it holds a checkpoint).

        Raises FileExistsError, or another OSError where `out` cannot be written; ValueError where
        `out` is the checkpoint that is read, lies inside it or around it, or has the wrong ending.
        """
        with self.creating(out, force=force) as files:
            writer = self._writer(files, Path(out).suffix)
            yield writer
            writer.finish()

    @contextmanager
    def creating(self, out: str | os.PathLike[str], *, force: bool = False) -> Iterator[list[Path]]:
        """`create`, for those who fill the files themselves, which are there and empty."""
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
            yield self._files(temporary)

    def _files(self, temporary: Path) -> list[Path]:
        """The files to be filled, all else being there; `temporary` is an empty file or folder."""
        return [temporary]

    @abstractmethod
    def _writer(self, files: list[Path], ending: str) -> Writer:
        """A writer that fills the files, for an output that has this ending."""

    def _check_apart(self, out: Path) -> None:
        if self.form == "timm":
            return
        source, target = Path(self.path).resolve(), out.resolve()
        if source == target or (out.exists() and out.samefile(source)):
            raise ValueError(f"the output must not be the checkpoint that is read, got {out}")
        if source in target.parents or target in source.parents:
            raise ValueError(f"the output must lie apart from {self.path}, got {out}")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - no file is held open
        """Tensors that were read stay valid."""


class Writer:
    """Takes the tensors of a new checkpoint, one by one.

    A tensor must have the shape and dtype of the one that it stands for.

    names: of all tensors, in the order of the file.
    """

    def __init__(
        self,
        tensors: Mapping[str, Spec],
        write: Callable[[str, Tensor], object],
        complete: Callable[[], object] = lambda: None,
    ) -> None:
        self.names = tuple(tensors)
        self._left, self._write, self._complete = dict(tensors), write, complete

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, once."""
        want = self._left.get(name)
        if want is None:
            raise ValueError(f"a tensor must be one of the checkpoint's, put once, got {name}")
        if tuple(tensor.shape) != want.torch_shape or str(tensor.dtype) != str(want.dtype):
            raise ValueError(
                f"{name} must be {want.dtype} {list(want.torch_shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        self._write(name, tensor.detach())
        del self._left[name]

    def finish(self) -> None:
        """Complete the files; called by `Checkpoint.create`."""
        if self._left:
            raise ValueError(f"every tensor must be written, got none for {next(iter(self._left))}")
        self._complete()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the CPU."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def check_apart(kind: str, path: Path, others: Mapping[str, Path]) -> None:
    """An output must not be one of the others, or lie in one; kind: what it is, for the error."""
    place = path.resolve()
    for name, other in others.items():
        if other.resolve() in (place, *place.parents):
            raise ValueError(f"{kind} must lie apart from {name}, got {path}")


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
