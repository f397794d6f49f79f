"""Bitmask files, and folders of them, read and made dense."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _C
from .base import Progress, Silent
from .locate import SAFETENSORS, find_weights
from .native import FILL, READ, Told, begin, opened
from .shards import Shards

if TYPE_CHECKING:
    from torch import Tensor


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, or a folder of them, bitmask or dense: name -> tensor on the CPU.

    Returns the tensors in the order of the dense file, bit by bit as they were. With a file
    `safetensors.torch.load_file` would read, it returns the same.

    Raises OSError where a file cannot be read; ValueError where it is damaged, holds no tensors, or
    is of a version of the bitmask format that this dimap does not know.
    """
    checkpoint = _open(path, alone=True)
    return {name: checkpoint.get(name) for name in checkpoint.tensors}


def expand(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the dense file (or folder) that a bitmask file (or folder of them) stands for.

    The source is read piece by piece, however large its tensors are. The dense file is that which
    was pruned, byte by byte, but for the weights set to zero. `target` appears complete or not at all.

    force: replace an output that is there already.

    Raises ValueError for a source that is not a bitmask file, is damaged or of a version that this
    dimap does not know; OSError where files cannot be read or written; FileExistsError where the
    output exists and not `force`.
    """
    checkpoint = _open(source, alone=False)
    if not checkpoint.packed:
        raise ValueError(f"{checkpoint.path} must be a bitmask file, got one that is dense already")
    shards = checkpoint.shards
    packed, names, rest = [], [], []
    for file, shard in enumerate(shards):
        for entry in shard.header.entries:
            values, bits = shard.layout.places[entry.name]
            if bits is None:
                rest.append((file, values.begin, entry.nbytes, entry.begin))
                continue
            numbers = (values.begin, values.numel(), bits.begin, entry.numel(), entry.dtype.size)
            packed.append((file, *numbers, entry.begin))
            names.append(f"{shard.path}: {entry.name}")
    told = Told(progress or Silent())
    with (
        checkpoint.creating(target, force=force) as targets,
        opened([shard.path for shard in shards], READ) as sources,
        opened(targets, FILL) as outputs,
    ):
        for output, shard in zip(outputs, shards, strict=True):
            begin(output, shard.header)
        try:
            _C.expand(sources, outputs, packed, rest, progress=told)
        except _C.BitsError as error:
            number, required, got = error.args
            if required < 0:
                raise ValueError(
                    f"{names[number]} must have zeros in the unused bits, got ones"
                ) from error
            raise ValueError(
                f"{names[number]} must have as many values as its bits say, {required}, got {got}"
            ) from error
        told.finish()


def _open(path: str | os.PathLike[str], *, alone: bool) -> Shards:
    found = find_weights(Path(path), alone=alone)
    if found.form != SAFETENSORS:
        raise ValueError(f"{os.fspath(path)} must hold safetensors, got files of {found.form}")
    return Shards(os.fspath(path), "folder" if os.path.isdir(path) else SAFETENSORS, found)
