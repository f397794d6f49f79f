"""Bitmask files, and folders of them, read and made dense."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _C
from .base import Progress, Silent
from .compact import Table, bits_error, decoded
from .header import Entry
from .locate import SAFETENSORS, find_weights
from .native import FILL, READ, Told, begin, opened, write_fully
from .shards import Shard, Shards
from .sparse_bitmask import SparseBitmask

if TYPE_CHECKING:
    from torch import Tensor


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, or a folder of them, bitmask or dense: name -> tensor on the CPU.

    Returns the tensors in the order of the dense file, bit by bit as they were. With a file
    `safetensors.torch.load_file` would read, it returns the same.

    Raises OSError where a file cannot be read; ValueError where it is damaged, holds no tensors, or
    is of a version of the bitmask format that this dimap does not know.
    """
    shards = _open(path, alone=True).shards
    return {name: tensor for shard in shards for name, tensor in shard.load(shard.entries).items()}


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
    A checkpoint that compressed-tensors wrote as `sparse-bitmask` is made dense, too; its config.json then
    says so.

    force: replace an output that is there already.

    Raises ValueError for a source that is not a bitmask file, is damaged or of a version that this
    dimap does not know; OSError where files cannot be read or written; FileExistsError where the
    output exists and not `force`.
    """
    checkpoint = _open(source, alone=False)
    shards = checkpoint.shards
    headers = [shard.header for shard in shards]
    packed, names, rest, compact = [], [], [], []
    foreign = None
    if not checkpoint.packed:
        if not checkpoint.foreign:
            raise ValueError(
                f"{checkpoint.path} must be a bitmask file, got one that is dense already"
            )
        foreign = SparseBitmask(checkpoint)
        headers, packed, names, rest = foreign.headers, foreign.packed, foreign.names, foreign.rest
    for file, shard in enumerate(() if foreign else shards):
        if shard.layout.form == "compact":
            compact.append((file, shard, shard.table(shard.entries)))
            continue
        for entry in shard.header.entries:
            values, bits = shard.layout.places[entry.name]
            if bits is None:
                rest.append((file, values.begin, entry.nbytes, entry.begin))
                continue
            numbers = (bits.begin, entry.numel(), entry.dtype.size, entry.begin)
            packed.append((file, values.begin, values.numel(), file, *numbers))
            names.append(f"{shard.path}: {entry.name}")
    progress = progress or Silent()
    told = Told(progress)
    with (
        checkpoint.creating(target, force=force) as targets,
        opened([shard.path for shard in shards], READ) as sources,
        opened(targets, FILL) as outputs,
    ):
        for output, header in zip(outputs, headers, strict=True):
            begin(output, header)
        try:
            if packed or rest:
                _C.expand(sources, outputs, packed, rest, progress=told)
        except _C.BitsError as error:
            raise bits_error(names[error.args[0]], error) from error
        told.finish()
        for file, shard, table in compact:
            _expand_blocks(shard, table, outputs[file], progress)
        if foreign:
            foreign.finish(targets)


def _expand_blocks(shard: Shard, table: Table, output: tuple[int, str], progress: Progress) -> None:
    """Fill an output, which has its header, from the blocks of a compact file."""

    def write(entry: Entry, first: int, data: memoryview) -> int:
        size = len(data)
        write_fully(output, data, entry.begin + first * (entry.dtype.size or 1))
        return size

    progress.step("expanding", sum(entry.nbytes for entry in shard.header.entries))
    for written in decoded(shard.path, table, write):
        progress.advance(written)


def _open(path: str | os.PathLike[str], *, alone: bool) -> Shards:
    found = find_weights(Path(path), alone=alone)
    if found.form != SAFETENSORS:
        raise ValueError(f"{os.fspath(path)} must hold safetensors, got files of {found.form}")
    return Shards(os.fspath(path), "folder" if os.path.isdir(path) else SAFETENSORS, found)
