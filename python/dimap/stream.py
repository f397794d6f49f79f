"""Prune a safetensors file, or a folder of them, without loading it: exactly, at the disk's speed.

Surveys add up, so a checkpoint is pruned as it streams by: read once to find the cuts, once more to
write the output. Memory does not grow with the checkpoint, nor with its largest tensor, and the
result is bit by bit that of `dimap.prune`.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from ._checkpoint_safetensors import Shards, ShardsWriter
from ._files import replacing
from ._plan import Normalize, Plan
from ._scopes import Scope
from ._stream_cut import GRAINS, Alone, Cutter, Progress, Ranks
from ._stream_guess import keys_of
from ._stream_io import Block, Buffer, Outputs, Piece, Source, each, opened, pieces_of
from .checkpoint import open_checkpoint
from .groups import AUX, Layer, Patterns

if TYPE_CHECKING:
    from .report import Report

__all__ = ["Progress", "StreamPruning", "prune_checkpoint", "pruning_checkpoint"]


@dataclass
class StreamPruning:
    """What was pruned: `dimap.Pruning` without the weights and masks, which lie in files.

    modules, thresholds, scope, normalize, sparsity: as in `dimap.Pruning`.
    shapes, dtypes: of every parameter, "aux" included.
    kept: how many weights the masks keep, of every pruned parameter.
    nonzero: how many are not zero in the output, of every parameter, "aux" included.
    smallest: the smallest kept magnitude of a layer, under each of its parameters; none where
        nothing is kept.
    readings: how often the weights were read to find the cuts.
    """

    modules: dict[str, list[Layer]]
    thresholds: dict[str, float]
    scope: Scope
    normalize: Normalize
    sparsity: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    kept: dict[str, int]
    nonzero: dict[str, int]
    smallest: dict[str, float] = field(default_factory=dict)
    readings: int = 1

    def report(
        self, model: nn.Module | None = None, input_size: int | Sequence[int] | None = None
    ) -> Report:
        """Tables of what is left; with `model`, FLOPs too (see `dimap.report.build_report`)."""
        from .report import build_report

        return build_report(self, model, input_size)


def prune_checkpoint(
    source: str | os.PathLike[str] | Shards,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
    masks: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> StreamPruning:
    """Prune a safetensors file or a Hugging Face folder of them into another.

    source: the path, or an open checkpoint. It is only read.
    target: a file for a file, a folder for a folder. It appears complete or not at all: the same
        headers, metadata, index and other files, with weights set to zero.
    sparsity, scope, normalize, patterns: as in `dimap.select`.
    masks: a file for the masks (see `dimap.load_masks`), one bit a weight.
    force: replace outputs that are there already.

    Raises ValueError for a checkpoint that is damaged, of no known family, or holds weights that
    are not finite or not float32, bfloat16 or float16; OSError where files cannot be read or
    written; FileExistsError where an output exists and not `force`.
    """
    with pruning_checkpoint(
        source,
        target,
        sparsity,
        scope=scope,
        normalize=normalize,
        patterns=patterns,
        masks=masks,
        force=force,
        progress=progress,
    ) as pruned:
        return pruned


@contextmanager
def pruning_checkpoint(
    source: str | os.PathLike[str] | Shards,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
    masks: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Iterator[StreamPruning]:
    """`prune_checkpoint`, but the outputs appear when the block ends, and not if it fails."""
    with ExitStack() as stack:
        if isinstance(source, Shards):
            checkpoint = source
        else:
            found = stack.enter_context(open_checkpoint(source))
            if not isinstance(found, Shards):
                raise ValueError(f"a stream needs safetensors files, got {found.path}")
            checkpoint = found
        job = _Job(checkpoint, sparsity, scope, normalize, patterns, progress or _Silent())
        packed = None
        if masks is not None:
            packed = stack.enter_context(replacing(Path(masks), force=force))
        writer = stack.enter_context(checkpoint.create(target, force=force))
        assert isinstance(writer, ShardsWriter)
        pruned = job.run(list(writer.targets), packed, Alone())
        writer.filled()
        yield pruned


class _Silent:
    def step(self, description: str, total: int | None = None) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass


class _Job:
    """One checkpoint being pruned."""

    def __init__(
        self,
        checkpoint: Shards,
        sparsity: float | Mapping[str, float],
        scope: Scope,
        normalize: Normalize,
        patterns: Patterns | None,
        progress: Progress,
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
        self.progress = progress
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

    def run(self, targets: list[Path], masks: Path | None, ranks: Ranks) -> StreamPruning:
        with opened([source.path for source in self.sources]) as descriptors:
            self.descriptors = descriptors
            self.cutter = Cutter(
                self.plan, self.keep, self.sources, descriptors, ranks, self.progress
            )
            self.cutter.run()
            self.result.readings = self.cutter.readings
            self._share_quotas()
            self._find_smallest()
            self._write(targets, masks)
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
            for piece in pieces_of(file, [entry]):
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
        number = self.cutter.number
        for module, layers in self.plan.modules.items():
            for layer in layers if module != AUX else []:
                keys = [k for p in layer.parameters for k in self._noted_keys(number[p])]
                if keys:
                    self.layer_keys.update(dict.fromkeys(layer.parameters, min(keys)))
                else:
                    self.unseen.update(layer.parameters)

    def _noted_keys(self, tensor: int) -> list[int]:
        keep_from, tie = self._cut(tensor)
        found = []
        for (i, start), note in self.cutter.notes_of(self.plan.layers[tensor]).items():
            if i != tensor:
                continue
            if tie >= 0 and self.quotas.get((i, start), 0) > 0:
                found.append(tie)
            elif (key := note.smallest(keep_from)) is not None:
                found.append(key)
        return found

    # The output

    def _write(self, targets: list[Path], masks: Path | None) -> None:
        sizes = [source.path.stat().st_size for source in self.sources]
        pieces = [
            piece
            for file, source in enumerate(self.sources)
            for piece in pieces_of(file, source.header.entries)
        ]
        self.progress.step("writing", sum(p.end - p.begin for p in pieces))
        with ExitStack() as stack:
            self.outputs = stack.enter_context(Outputs(targets, sizes))
            self.masks = None
            if masks is not None:
                self.places, header, size = _mask_file(self.plan, self.result)
                self.masks = stack.enter_context(Outputs([masks], [size]))
                self.masks.write(0, header, 0)
            for file, source in enumerate(self.sources):
                self.outputs.write(file, source.header.raw, 0)
            each(pieces, self._write_piece)

    def _path(self, piece: Piece) -> Path:
        return self.sources[piece.file].path

    def _write_piece(self, piece: Piece, buffer: Buffer) -> None:
        data = buffer.read(self.descriptors[piece.file], piece.begin, piece.end, self._path(piece))
        number = self.cutter.number
        pruned = [b for b in piece.blocks if b.entry.name in number]
        tensors = [buffer.tensor(block, piece) for block in pruned]
        numbers = [number[block.entry.name] for block in pruned]
        if pruned:
            cuts = torch.tensor([self._cut(i) for i in numbers])
            places = zip(numbers, pruned, strict=True)
            quota = [self.quotas.get((i, block.start), 0) for i, block in places]
            each_one = range(len(pruned))  # every block is a layer and a module by itself
            kept, _ = ops.emit(tensors, each_one, each_one, cuts, torch.tensor(quota))
            ops.apply_(tensors, kept)
            for block, tensor, mask in zip(pruned, tensors, kept, strict=True):
                buffer.put_back(block, piece, tensor)
                self._count(block, tensor, mask)
        self.outputs.write(piece.file, data, piece.begin)
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
