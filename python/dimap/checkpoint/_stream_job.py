"""One checkpoint pruned from files to files, or one rank's part of it: cuts, output, counts."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..groups import Patterns
from ..groups._plan import Normalize, Plan
from ..groups._scopes import Scope
from ._bitmask_stream import Packer
from ._safetensors import Shards
from ._stream_cut import GRAINS, Cutter
from ._stream_decide import Decisions
from ._stream_guess import keys_of
from ._stream_io import Block, Buffer, Outputs, Piece, Source, opened
from ._stream_mask_file import lay_out_masks
from ._stream_part import Part
from ._stream_threads import each
from ._stream_types import Progress, StreamPruning


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
            self.decisions = Decisions(self.cutter)
            self.layer_keys = dict(self.decisions.smallest)
            nonzero = self.decisions.count_nonzero() if bitmask else None
            self.packer = Packer(self.sources, nonzero) if nonzero is not None else None
            self._write(targets, masks)
        self._add_up()
        self._check_counts()
        thresholds = (scope.threshold for scope in self.cutter.scopes)
        self.result.thresholds = dict(zip(self.plan.scope_names, thresholds, strict=True))
        return self.result

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
                self.places, header, size = lay_out_masks(self.plan, self.result)
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
        pruned, tensors, kept = self.decisions.prune(piece, buffer)
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
        keep_from, tie = self.decisions.cut(self.cutter.number[name])
        nonzero = kept if keep_from > 0 and tie != 0 else _count_nonzero(tensor)
        smallest = None
        if name in self.decisions.unseen and kept:
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
