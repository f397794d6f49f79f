"""Dense files on their way into bitmask files, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ._bitmask_layout import Layout, lay_out, size_of
from ._stream_io import Buffer, Outputs, Piece, Source, blocks_of

Counts = Mapping[tuple[str, int], int]  # (tensor, first weight of a block) -> nonzero weights


class Packer:
    """Pieces of dense files on their way into bitmask files.

    nonzero: of every block of the tensors that may be packed.
    """

    def __init__(self, sources: Sequence[Source], nonzero: Counts) -> None:
        self._nonzero = nonzero
        totals: dict[str, int] = {}
        for (name, _), count in nonzero.items():
            totals[name] = totals.get(name, 0) + count
        self.layouts: list[Layout] = []
        for source in sources:
            names = {entry.name for entry in source.header.entries}
            mine = {name: count for name, count in totals.items() if name in names}
            self.layouts.append(lay_out(source.header, mine, str(source.path)))
        self._values = [values_of(layout, nonzero) for layout in self.layouts]
        self._own = threading.local()

    def create(self, paths: Sequence[Path]) -> Outputs:
        """The files, with their headers."""
        outputs = Outputs(paths, [size_of(layout.header) for layout in self.layouts])
        try:
            for file, layout in enumerate(self.layouts):
                outputs.write(file, layout.header.raw, 0)
        except BaseException:
            outputs.__exit__()
            raise
        return outputs

    def write(
        self, piece: Piece, buffer: Buffer, tensors: Mapping[str, Tensor], to: Outputs
    ) -> None:
        """Write a piece. tensors: those of its blocks that may be packed; `buffer` holds the rest."""
        places = self.layouts[piece.file].places
        for block in piece.blocks:
            place = places[block.entry.name]
            if place.bits is None:
                at = block.begin - piece.begin
                data = buffer.bytes[at : at + block.end - block.begin]
                to.write(piece.file, data, place.values.begin + block.begin - block.entry.begin)
                continue
            bits, values = ops.pack(tensors[block.entry.name])
            want = self._nonzero[block.entry.name, block.start]
            if values.numel() != want:
                raise ValueError(
                    f"the input must not change while it is read: {block.entry.name} must have "
                    f"{want} nonzero weights in a part of it, got {values.numel()}"
                )
            begin, end = self._values[piece.file][block.entry.name, block.start]
            room = self._buffer().room(begin, end)  # aligned as in the file
            room[:] = bytes_of(values)
            to.write(piece.file, room, begin)
            to.write(piece.file, bytes_of(bits), place.bits.begin + block.start // 8)

    def _buffer(self) -> Buffer:
        """One for each thread."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = Buffer()
        buffer: Buffer = self._own.buffer
        return buffer


def values_of(layout: Layout, counts: Counts) -> dict[tuple[str, int], tuple[int, int]]:
    """The bytes of every packed block's values; counts: how many there are."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for entry in layout.dense.entries:
        place = layout.places[entry.name]
        at = place.values.begin
        for block in blocks_of(entry) if place.bits else ():
            end = at + counts[entry.name, block.start] * entry.dtype.itemsize
            found[entry.name, block.start] = at, end
            at = end
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's memory."""
    view: memoryview = tensor.view(torch.uint8).numpy().data
    return view
