"""What every form of checkpoint offers: names, shapes, tensors one at a time, and outputs of its form."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .._files import kind_of, replacing
from ..groups import Choice, Grouping, Layer, group, is_parameter
from .header import Spec
from .locate import LEFT_OUT, PICKLED, SINGLE, choose_weights

if TYPE_CHECKING:
    from torch import Tensor


class Progress(Protocol):
    """What the work calls as it goes on; `advance` with bytes."""

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
        form: "safetensors", "folder", "pickled", "pickled folder" or "timm".
        files: those that hold its weights; none of a timm model.
        tensors: name -> `Spec` (dtype, shape, nbytes), in the order of the files; never empty.
        metadata: strings stored beside the tensors of a safetensors file.
        others: what else in a folder holds weights, relative to it.
        notes: what the user should know about this checkpoint, one sentence each.
        choice: how its tensors are grouped, where that is not left to the known families.
    """

    # File name endings that an output may have, beside that of the file; a folder may have any name.
    endings: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | os.PathLike[str],
        form: str,
        files: Sequence[Path],
        tensors: Mapping[str, Spec],
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self.form = os.fspath(path), form
        self.files, self.tensors, self.metadata = list(files), dict(tensors), dict(metadata)
        self.others: list[str] = []
        self.notes: list[str] = []
        self.choice = Choice()
        if not tensors:
            raise ValueError(f"{self.path} must hold at least one tensor, got none")

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, whose other files an output keeps."""
        return self.form.endswith("folder")

    @property
    def place(self) -> Path | None:
        """The folder or file that is read; None of a timm model."""
        if not self.files:
            return None
        return self.files[0].parent if self.is_folder else self.files[0]

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU. Writing into it changes no file."""

    @abstractmethod
    def rewrite(
        self, targets: Sequence[Path], state: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        """Write the files anew. state: the tensors, masked already. masks: for copies beside them."""

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
        return group(self.shapes(), self.choice, self.ties())

    def ties(self) -> Sequence[tuple[str, ...]]:
        """The names of each set of parameters that are the same weights; in safetensors none are."""
        return ()

    @contextmanager
    def creating(self, out: str | os.PathLike[str], *, force: bool = False) -> Iterator[list[Path]]:
        """Empty files for weights, at `out` when the block ends, or nothing there if it fails.

        They stand for `files` (one file for a timm model), and nobody may read them who may not read
        those; a folder's other files are there already.
        force: replace an `out` that is there already (a folder only if it holds a checkpoint).

        Raises FileExistsError, or another OSError where `out` cannot be written; ValueError where
        `out` is the checkpoint that is read, lies inside it or around it, or has the wrong ending.
        """
        target, folder = Path(out), self.is_folder
        self._check_place(target)
        if folder and force and target.is_dir():
            _check_replaceable(target)
        with replacing(target, folder=folder, force=force) as temporary:
            files = [temporary]
            if folder:
                files = [temporary / file.name for file in self.files]
                copy_folder(self.files[0].parent, temporary, [file.name for file in files])
                for file in files:
                    file.touch(exist_ok=False)
            for file, source in zip(files, self.files, strict=False):  # a timm model has none
                file.chmod(stat.S_IMODE(file.stat().st_mode) & (source.stat().st_mode | 0o600))
            yield files

    def _check_place(self, out: Path) -> None:
        if self.place is not None:
            source, target = self.place.resolve(), out.resolve()
            if source == target or (out.exists() and out.samefile(source)):
                raise ValueError(f"the output must not be the checkpoint that is read, got {out}")
            if source in target.parents or target in source.parents:
                raise ValueError(f"the output must lie apart from {self.path}, got {out}")
        if self.is_folder and out.suffix.lower() in (".safetensors", *PICKLED) and not out.is_dir():
            raise ValueError(
                f"the output for the folder {self.path} must be a folder, got the name of a file: {out}"
            )
        if not self.is_folder and not out.is_dir():
            endings = [*self.endings, *(file.suffix for file in self.files)]
            if out.suffix.lower() not in map(str.lower, endings):
                names = " or ".join(dict.fromkeys(filter(None, endings)))
                raise ValueError(f"the output for {self.path} must end in {names}, got {out}")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - no file is held open
        """Tensors that were read stay valid."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the CPU."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def copy_folder(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy what a folder holds into another; symbolic links are followed, so that it stands alone.

    without: names at its top that are left out, as `LEFT_OUT` and locks are at every depth.
    """
    home = source.resolve()
    for child in sorted(source.iterdir()):
        if child.name in without or child.name in LEFT_OUT or child.suffix == ".lock":
            continue
        copy, kind = target / child.name, kind_of(child)
        if kind == "a file":
            shutil.copy2(child, copy)
        elif kind == "a folder" and child.resolve() not in (home, *home.parents):
            copy.mkdir()
            copy_folder(child, copy)
            shutil.copystat(child, copy)
        else:
            got = "a link to a folder around it" if kind == "a folder" else kind
            raise OSError(
                errno.EINVAL, f"must be a file or folder to be copied, got {got}", str(child)
            )


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced, thus removed, only if it plainly is an earlier output."""
    try:
        if any(folder.iterdir()):
            choose_weights(folder)
    except (FileNotFoundError, ValueError):
        raise FileExistsError(
            errno.EEXIST, f"is not replaced: it is a folder without {SINGLE}", str(folder)
        ) from None
