"""From the cuts and the survey's notes to what is kept of each block: ties, counts, the weights."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .. import ops
from ..groups import AUX
from ._stream_cut import Cutter
from ._stream_guess import keys_of
from ._stream_io import Block, Buffer, Piece
from ._stream_threads import each


class Decisions:
    """What is kept of each block, where the cuts are known.

    quotas: (tensor, first weight of a block) -> how many of its tied weights are kept.
    smallest: parameter -> the smallest kept key of its layer, where the notes tell.
    unseen: the parameters of which they do not.

    What the notes do not tell is read again. All ranks make one together.
    """

    def __init__(self, cutter: Cutter) -> None:
        self.cutter, self.plan, self.ranks = cutter, cutter.plan, cutter.ranks
        self.sources, self.descriptors, self.part = cutter.sources, cutter.descriptors, cutter.part
        self._lock = threading.Lock()
        self._share_quotas()
        self._find_smallest()

    def cut(self, tensor: int) -> list[int]:
        """The key from which weights are kept, and the key of the ties or -1."""
        scope, row = self.cutter.place[self.plan.layers[tensor]]
        return self.cutter.scopes[scope].cuts[row]

    # Ties: the first ones in the plan's order are kept

    def _share_quotas(self) -> None:
        """How many of the tied weights each block keeps."""
        self.quotas: dict[tuple[int, int], int] = {}
        entries = {e.name: (f, e) for f, s in enumerate(self.sources) for e in s.header.entries}
        tied = [i for i in range(len(self.plan.names)) if self.cut(i)[1] >= 0]
        counts: dict[tuple[int, int], int] = {}
        unknown: list[Piece] = []
        for i in tied:
            scope, _ = self.cutter.place[self.plan.layers[i]]
            notes = self.cutter.notes.of(self.plan.layers[i])
            file, entry = entries[self.plan.names[i]]
            for piece in self.part.pieces(file, [entry]):
                for block in piece.blocks:
                    note = notes.get((i, block.start))
                    if self.cutter.scopes[scope].noted and note is not None:
                        counts[i, block.start] = note.count(self.cut(i)[1])
                    else:
                        unknown.append(Piece(file, block.begin, block.end, (block,)))

        def count(piece: Piece, buffer: Buffer) -> None:
            (block,) = piece.blocks
            i = self.cutter.number[block.entry.name]
            self._read(piece, buffer)
            found = int((keys_of(buffer.tensor(block, piece)) == self.cut(i)[1]).sum())
            with self._lock:
                counts[i, block.start] = found

        each(unknown, count)
        for others in self.ranks.gather(counts):
            counts |= others
        left = [scope.quota for scope in self.cutter.scopes]
        for i, start in sorted(counts):  # the plan's order
            scope = self.plan.scopes[i]
            self.quotas[i, start] = min(left[scope], counts[i, start])
            left[scope] -= self.quotas[i, start]

    # The smallest kept magnitudes, for the report

    def _find_smallest(self) -> None:
        """From the notes where they tell; layers of which they do not are looked at in writing."""
        self.unseen: set[str] = set()
        self.smallest: dict[str, int] = {}  # parameter -> smallest kept key, where known
        found = self.ranks.gather([self._noted_keys(i) for i in range(len(self.plan.names))])
        number = self.cutter.number
        for module, layers in self.plan.modules.items():
            for layer in layers if module != AUX else []:
                keys = [k for p in layer.parameters for rank in found for k in rank[number[p]]]
                if keys:
                    self.smallest.update(dict.fromkeys(layer.parameters, min(keys)))
                else:
                    self.unseen.update(layer.parameters)

    def _noted_keys(self, tensor: int) -> list[int]:
        """The smallest kept key of a tensor in this rank's notes, if it is in them."""
        keep_from, tie = self.cut(tensor)
        found = []
        for (i, start), note in self.cutter.notes.of(self.plan.layers[tensor]).items():
            if i != tensor:
                continue
            if tie >= 0 and self.quotas.get((i, start), 0) > 0:
                found.append(tie)
            elif (key := note.smallest(keep_from)) is not None:
                found.append(key)
        return [min(found)] if found else []

    # How many are not zero, for the places in a bitmask file

    def count_nonzero(self) -> dict[tuple[str, int], int]:
        """How many weights of each block will have any bit set: from the notes, or by looking."""
        counts: dict[tuple[str, int], int] = {}
        unknown: list[Piece] = []
        number = self.cutter.number
        for file, source in enumerate(self.sources):
            entries = [entry for entry in source.header.entries if entry.name in number]
            for block in (b for piece in self.part.pieces(file, entries) for b in piece.blocks):
                i = number[block.entry.name]
                keep_from, tie = self.cut(i)
                note = self.cutter.notes.of(self.plan.layers[i]).get((i, block.start))
                kept = None
                if keep_from > 0 and tie != 0 and note is not None:  # no zero is kept
                    kept = note.kept(keep_from)
                if kept is None:
                    unknown.append(Piece(file, block.begin, block.end, (block,)))
                else:
                    tied = self.quotas.get((i, block.start), 0)
                    counts[block.entry.name, block.start] = kept + tied

        def count(piece: Piece, buffer: Buffer) -> None:
            self._read(piece, buffer)
            (block,), (tensor,), _ = self.prune(piece, buffer)
            bits = tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)
            counts[block.entry.name, block.start] = int(torch.count_nonzero(bits))

        each(unknown, count)
        for others in self.ranks.gather(counts):
            counts |= others
        return counts

    # The decision on weights

    def prune(self, piece: Piece, buffer: Buffer) -> tuple[list[Block], list[Tensor], list[Tensor]]:
        """The blocks to prune of a piece in the buffer, their pruned weights, and the masks."""
        number = self.cutter.number
        pruned = [b for b in piece.blocks if b.entry.name in number]
        if not pruned:
            return [], [], []
        tensors = [buffer.tensor(block, piece) for block in pruned]
        numbers = [number[block.entry.name] for block in pruned]
        cuts = torch.tensor([self.cut(i) for i in numbers])
        places = zip(numbers, pruned, strict=True)
        quota = [self.quotas.get((i, block.start), 0) for i, block in places]
        each_one = range(len(pruned))  # every block is a layer and a module by itself
        kept, _ = ops.emit(tensors, each_one, each_one, cuts, torch.tensor(quota))
        ops.apply_(tensors, kept)
        return pruned, tensors, kept

    def _read(self, piece: Piece, buffer: Buffer) -> None:
        path = self.sources[piece.file].path
        buffer.read(self.descriptors[piece.file], piece.begin, piece.end, path)
