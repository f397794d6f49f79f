"""Bitmask files on their way back into dense ones, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import ops
from ._bitmask_layout import Layout, size_of, unpacked, why
from ._bitmask_stream import Counts, bytes_of, values_of
from ._header import Entry
from ._safetensors import Shards, ShardsWriter
from ._stream_io import Block, Buffer, Outputs, Piece, blocks_of, opened, pieces_of, read_into
from ._stream_threads import each
from ._stream_types import Progress


def expand_checkpoint(
    checkpoint: Shards, target: str | os.PathLike[str], *, force: bool, progress: Progress
) -> None:
    """Write the dense file or folder that an open checkpoint stands for."""
    if not checkpoint.packed:
        raise ValueError(f"{checkpoint.path} must hold a bitmask file, got dense weights")
    # A folder may hold dense files too.
    layouts = [shard.layout or unpacked(shard.header) for shard in checkpoint.shards]
    paths = [shard.path for shard in checkpoint.shards]
    with checkpoint.create(target, force=force) as writer, opened(paths) as descriptors:
        assert isinstance(writer, ShardsWriter)
        sizes = [size_of(layout.dense) for layout in layouts]
        with Outputs(list(writer.targets), sizes) as outputs:
            _unpack(layouts, paths, descriptors, outputs, progress)
        writer.filled()


def _unpack(
    layouts: Sequence[Layout],
    paths: Sequence[Path],
    descriptors: Sequence[int],
    outputs: Outputs,
    progress: Progress,
) -> None:
    values_at = [
        values_of(layout, counts)
        for layout, counts in zip(
            layouts, _count(layouts, paths, descriptors, progress), strict=True
        )
    ]
    pieces = [
        piece
        for file, layout in enumerate(layouts)
        for piece in pieces_of(file, layout.dense.entries)
    ]
    for file, layout in enumerate(layouts):
        outputs.write(file, layout.dense.raw, 0)

    def read(file: int, begin: int, end: int) -> memoryview:
        memory = bytes_of(torch.empty(end - begin, dtype=torch.uint8))
        read_into(descriptors[file], memory, begin, paths[file])
        return memory

    def unpack(piece: Piece, buffer: Buffer) -> None:
        file, layout = piece.file, layouts[piece.file]
        data = buffer.room(piece.begin, piece.end)
        for block in piece.blocks:
            part = data[block.begin - piece.begin : block.end - piece.begin]
            place = layout.places[block.entry.name]
            if place.bits is None:
                begin = place.values.begin + block.begin - block.entry.begin
                read_into(descriptors[file], part, begin, paths[file])
                continue
            begin, end = values_at[file][block.entry.name, block.start]
            first, last = _bits_of(block, place.bits)
            bits = torch.frombuffer(read(file, first, last), dtype=torch.uint8)
            values = torch.empty(0, dtype=block.entry.dtype)
            if end > begin:
                values = torch.frombuffer(read(file, begin, end), dtype=block.entry.dtype)
            try:
                dense = ops.unpack(bits, values, [block.weights])
            except RuntimeError as error:  # the bits are no longer those that were counted
                raise ValueError(
                    f"{paths[file]}: {block.entry.name} must match its bits and not change while "
                    f"it is read ({why(error)})"
                ) from error
            part[:] = bytes_of(dense)
        outputs.write(file, data, piece.begin)
        progress.advance(piece.end - piece.begin)

    progress.step("expanding", sum(piece.end - piece.begin for piece in pieces))
    each(pieces, unpack)


def _count(
    layouts: Sequence[Layout],
    paths: Sequence[Path],
    descriptors: Sequence[int],
    progress: Progress,
) -> list[Counts]:
    """How many values every packed block has, from one reading of the bits."""
    work = [
        (file, block, bits)
        for file, layout in enumerate(layouts)
        for entry in layout.dense.entries
        if (bits := layout.places[entry.name].bits)
        for block in blocks_of(entry)
    ]
    found: list[dict[tuple[str, int], int]] = [{} for _ in layouts]

    def count(item: tuple[int, Block, Entry], buffer: Buffer) -> None:
        file, block, bits = item
        data = buffer.read(descriptors[file], *_bits_of(block, bits), paths[file])
        found[file][block.entry.name, block.start] = int.from_bytes(data, "little").bit_count()

    progress.step("reading the bits")
    each(work, count)
    for path, layout, counts in zip(paths, layouts, found, strict=True):
        ones: dict[str, int] = {}
        for (name, _), n in counts.items():
            ones[name] = ones.get(name, 0) + n
        for name, n in ones.items():
            (got,) = layout.places[name].values.shape
            if got != n:
                raise ValueError(
                    f"{path}: {name} must have as many values as its bits say, {n}, got {got}"
                )
    return list(found)


def _bits_of(block: Block, bits: Entry) -> tuple[int, int]:
    begin = bits.begin + block.start // 8
    return begin, begin + (block.weights + 7) // 8
