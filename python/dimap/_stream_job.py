"""One checkpoint pruned from files to files, or one rank's part of it: cuts, ties, output, counts."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import ops
from ._bitmask_stream import Packer
from ._checkpoint_safetensors import Shards
from ._distributed import Ranks
from ._plan import Normalize, Plan
from ._scopes import Scope
from ._stream_cut import GRAINS, Cutter
from ._stream_guess import keys_of
from ._stream_io import Block, Buffer, Outputs, Piece, Source, each, opened
from ._stream_part import Part
from ._stream_types import Progress, StreamPruning
from .groups import AUX, Patterns


class Job:
    """One checkpoint being pruned."""

    def __init__(
        self,
        checkpoint: Shards,
        sparsity: float | Mapping[str, float],
        scope: Scope,
        normalize: Normalize,
        patterns: Patterns | None,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        # Shapes and dtypes are all that a plan needs: tensors of one element stand for them.
        state = {
            name: torch.zeros(1, dtype=t.dtype).as_strided(t.shape, (0,) * t.ndim)
            for name, t in checkpoint.tensors.items()
        }
        self.plan = Plan.of(state, scope, normalize, patterns)
        self.keep = self.plan.keep(sparsity)
        for name, tensor in zip(self.plan.names, self.plan.tensors, strict=True):
            if tensor.dtype not in GRAINS:
                got = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{name} must be float32, bfloat16 or float16, got {got}")
        self.sources = [Source(shard.path, shard.header) for shard in checkpoint.shards]
        self.progress, self.ranks = progress, ranks
        self.part = Part(self.sources, ranks)
        names = [p for layers in self.plan.modules.values() for x in layers for p in x.parameters]
        self.result = StreamPruning(
            modules=self.plan.modules,
            thresholds={},
            scope=scope,
            normalize=normalize,
            sparsity=self.plan.ratios(sparsity),
            shapes={name: tuple(state[name].shape) for name in names},
            dtypes={name: state[name].dtype for name in names},
            kept=dict.fromkeys(self.plan.names, 0),
            nonzero=dict.fromkeys(names, 0),
        )
        self._lock = threading.Lock()

    def check_agreement(self, *settings: object) -> None:
        """All ranks do the same job, or none does."""
        words = (self.plan.names, self.plan.layers, self.plan.scopes, self.keep, settings)
        digest = hashlib.sha256(repr(words).encode())
        for source in self.sources:
            digest.update(source.path.name.encode() + b"\0" + source.header.raw)
        found = self.ranks.gather(digest.hexdigest())
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    "all ranks must be given the same checkpoint and settings, "
                    f"got others on rank {rank} than on rank 0"
                )

    def run(
        self, targets: list[Path], masks: Path | None, *, bitmask: bool = False
    ) -> StreamPruning:
        """Find the cuts and fill the targets, empty files that exist; `masks` too."""
        with opened([source.path for source in self.sources]) as descriptors:
            self.descriptors = descriptors
            self.cutter = Cutter(
                self.plan,
                self.keep,
                self.sources,
                descriptors,
                self.part,
                self.ranks,
                self.progress,
            )
            self.cutter.run()
            self.result.readings = self.cutter.readings
            self._share_quotas()
            self._find_smallest()
            self.packer = Packer(self.sources, self._count_packed()) if bitmask else None
            self._write(targets, masks)
        self._add_up()
        self._check_counts()
        thresholds = (scope.threshold for scope in self.cutter.scopes)
        self.result.thresholds = dict(zip(self.plan.scope_names, thresholds, strict=True))
        return self.result

    def _cut(self, tensor: int) -> list[int]:
        """The key from which weights are kept, and the key of the ties or -1."""
        scope, row = self.cutter.place[self.plan.layers[tensor]]
        return self.cutter.scopes[scope].cuts[row]

    # Ties: the first ones in the plan's order are kept

    def _share_quotas(self) -> None:
        """How many of the tied weights each block keeps."""
        self.quotas: dict[tuple[int, int], int] = {}
        entries = {e.name: (f, e) for f, s in enumerate(self.sources) for e in s.header.entries}
        tied = [i for i in range(len(self.plan.names)) if self._cut(i)[1] >= 0]
        counts: dict[tuple[int, int], int] = {}
        unknown: list[Piece] = []
        for i in tied:
            scope, _ = self.cutter.place[self.plan.layers[i]]
            notes = self.cutter.notes_of(self.plan.layers[i])
            file, entry = entries[self.plan.names[i]]
            for piece in self.part.pieces(file, [entry]):
                for block in piece.blocks:
                    note = notes.get((i, block.start))
                    if self.cutter.scopes[scope].noted and note is not None:
                        counts[i, block.start] = note.count(self._cut(i)[1])
                    else:
                        unknown.append(Piece(file, block.begin, block.end, (block,)))

        def count(piece: Piece, buffer: Buffer) -> None:
            (block,) = piece.blocks
            i = self.cutter.number[block.entry.name]
            buffer.read(self.descriptors[piece.file], piece.begin, piece.end, self._path(piece))
            found = int((keys_of(buffer.tensor(block, piece)) == self._cut(i)[1]).sum())
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
        self.layer_keys: dict[str, int] = {}  # parameter -> smallest kept key, where known
        found = self.ranks.gather([self._noted_keys(i) for i in range(len(self.plan.names))])
        number = self.cutter.number
        for module, layers in self.plan.modules.items():
            for layer in layers if module != AUX else []:
                keys = [k for p in layer.parameters for rank in found for k in rank[number[p]]]
                if keys:
                    self.layer_keys.update(dict.fromkeys(layer.parameters, min(keys)))
                else:
                    self.unseen.update(layer.parameters)

    def _noted_keys(self, tensor: int) -> list[int]:
        """The smallest kept key of a tensor in this rank's notes, if it is in them."""
        keep_from, tie = self._cut(tensor)
        found = []
        for (i, start), note in self.cutter.notes_of(self.plan.layers[tensor]).items():
            if i != tensor:
                continue
            if tie >= 0 and self.quotas.get((i, start), 0) > 0:
                found.append(tie)
            elif (key := note.smallest(keep_from)) is not None:
                found.append(key)
        return [min(found)] if found else []

    # What a block keeps, for the places in a bitmask file

    def _count_packed(self) -> dict[tuple[str, int], int]:
        """How many weights of each block will have any bit set: from the notes, or by looking."""
        counts: dict[tuple[str, int], int] = {}
        unknown: list[Piece] = []
        number = self.cutter.number
        for file, source in enumerate(self.sources):
            entries = [entry for entry in source.header.entries if entry.name in number]
            for block in (b for piece in self.part.pieces(file, entries) for b in piece.blocks):
                i = number[block.entry.name]
                keep_from, tie = self._cut(i)
                note = self.cutter.notes_of(self.plan.layers[i]).get((i, block.start))
                kept = None
                if keep_from > 0 and tie != 0 and note is not None:  # no zero is kept
                    kept = note.kept(keep_from)
                if kept is None:
                    unknown.append(Piece(file, block.begin, block.end, (block,)))
                else:
                    tied = self.quotas.get((i, block.start), 0)
                    counts[block.entry.name, block.start] = kept + tied

        def count(piece: Piece, buffer: Buffer) -> None:
            buffer.read(self.descriptors[piece.file], piece.begin, piece.end, self._path(piece))
            (block,), (tensor,), _ = self._prune_blocks(piece, buffer)
            bits = tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)
            counts[block.entry.name, block.start] = int(torch.count_nonzero(bits))

        each(unknown, count)
        for others in self.ranks.gather(counts):
            counts |= others
        return counts

    # The output

    def _prune_blocks(
        self, piece: Piece, buffer: Buffer
    ) -> tuple[list[Block], list[Tensor], list[Tensor]]:
        """The blocks to prune of a piece in the buffer, their pruned weights, and the masks."""
        number = self.cutter.number
        pruned = [b for b in piece.blocks if b.entry.name in number]
        if not pruned:
            return [], [], []
        tensors = [buffer.tensor(block, piece) for block in pruned]
        numbers = [number[block.entry.name] for block in pruned]
        cuts = torch.tensor([self._cut(i) for i in numbers])
        places = zip(numbers, pruned, strict=True)
        quota = [self.quotas.get((i, block.start), 0) for i, block in places]
        each_one = range(len(pruned))  # every block is a layer and a module by itself
        kept, _ = ops.emit(tensors, each_one, each_one, cuts, torch.tensor(quota))
        ops.apply_(tensors, kept)
        return pruned, tensors, kept

    def _write(self, targets: list[Path], masks: Path | None) -> None:
        sizes = [source.path.stat().st_size for source in self.sources]
        pieces = [
            piece
            for file, source in enumerate(self.sources)
            for piece in self.part.pieces(file, source.header.entries)
        ]
        self.progress.step("writing", sum(p.end - p.begin for p in pieces))
        with ExitStack() as stack:
            packer = self.packer
            self.outputs = stack.enter_context(
                packer.create(targets) if packer else Outputs(targets, sizes)
            )
            self.masks = None
            if masks is not None:
                self.places, header, size = _mask_file(self.plan, self.result)
                self.masks = stack.enter_context(Outputs([masks], [size]))
                self.masks.write(0, header, 0)
            for file, source in enumerate(self.sources if packer is None else ()):
                self.outputs.write(file, source.header.raw, 0)
            each(pieces, self._write_piece)
            if self.ranks.rank > 0:  # what rank 0 brings to the disk need not be what others wrote
                self.outputs.sync()
                if self.masks is not None:
                    self.masks.sync()

    def _path(self, piece: Piece) -> Path:
        return self.sources[piece.file].path

    def _write_piece(self, piece: Piece, buffer: Buffer) -> None:
        data = buffer.read(self.descriptors[piece.file], piece.begin, piece.end, self._path(piece))
        number = self.cutter.number
        pruned, tensors, kept = self._prune_blocks(piece, buffer)
        for block, tensor, mask in zip(pruned, tensors, kept, strict=True):
            buffer.put_back(block, piece, tensor)
            self._count(block, tensor, mask)
        if self.packer is None:
            self.outputs.write(piece.file, data, piece.begin)
        else:
            found = {b.entry.name: t for b, t in zip(pruned, tensors, strict=True)}
            self.packer.write(piece, buffer, found, self.outputs)
        for block in piece.blocks:
            if block.entry.name in self.result.nonzero and block.entry.name not in number:
                nonzero = _count_nonzero(buffer.tensor(block, piece))
                with self._lock:
                    self.result.nonzero[block.entry.name] += nonzero
        self.progress.advance(piece.end - piece.begin)

    def _count(self, block: Block, tensor: Tensor, mask: Tensor) -> None:
        name = block.entry.name
        kept = int(np.count_nonzero(mask.numpy()))
        keep_from, tie = self._cut(self.cutter.number[name])
        nonzero = kept if keep_from > 0 and tie != 0 else _count_nonzero(tensor)
        smallest = None
        if name in self.unseen and kept:
            # Zeros become the largest number: of what is left the smallest is wanted.
            smallest = int((keys_of(tensor) - np.uint32(1)).min()) + 1 if kept == nonzero else 0
        if self.masks is not None:
            bits = np.packbits(mask.numpy(), bitorder="little")
            self.masks.write(0, bits.data, self.places[name] + block.start // 8)
        with self._lock:
            self.result.kept[name] += kept
            self.result.nonzero[name] += nonzero
            if smallest is not None:
                known = self.layer_keys.get(name, smallest)
                self.layer_keys[name] = min(known, smallest)

    def _add_up(self) -> None:
        """Counts of all ranks."""
        mine = (self.result.kept, self.result.nonzero, self.layer_keys)
        found = self.ranks.gather(mine)
        for name in self.result.kept:
            self.result.kept[name] = sum(kept[name] for kept, _, _ in found)
        for name in self.result.nonzero:
            self.result.nonzero[name] = sum(nonzero[name] for _, nonzero, _ in found)
        for _, _, keys in found:
            for name, key in keys.items():
                self.layer_keys[name] = min(self.layer_keys.get(name, key), key)

    def _check_counts(self) -> None:
        """Exactly what was asked for is kept, unless the input was not the same in both readings."""
        kept = [0] * len(self.keep)
        for name, scope in zip(self.plan.names, self.plan.scopes, strict=True):
            kept[scope] += self.result.kept[name]
        for scope, (want, got) in enumerate(zip(self.keep, kept, strict=True)):
            if want != got:
                raise ValueError(
                    f"the input must not change while it is read: {self.plan.scope_names[scope]} "
                    f"must keep {want} weights, got {got}"
                )
        values = {
            name: float(np.uint32(key).view(np.float32)) for name, key in self.layer_keys.items()
        }
        self.result.smallest = values


def _count_nonzero(tensor: Tensor) -> int:
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch cannot count float8
        tensor = tensor.float()
    return int(torch.count_nonzero(tensor))


def _mask_file(plan: Plan, result: StreamPruning) -> tuple[dict[str, int], bytes, int]:
    """The place of each tensor's bits in a mask file, the file's header and length."""
    settings: dict[str, str] = {"scope": result.scope, "normalize": result.normalize}
    settings |= {f"sparsity.{name}": repr(s) for name, s in result.sparsity.items()}
    shapes = {name: list(result.shapes[name]) for name in plan.names}
    settings |= {"dimap_masks": "1", "shapes": json.dumps(shapes)}
    header: dict[str, object] = {"__metadata__": settings}
    places, at = {}, 0
    for name in plan.names:
        size = (math.prod(shapes[name]) + 7) // 8
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        places[name] = at
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return {name: len(raw) + place for name, place in places.items()}, raw, len(raw) + at
