"""Safetensors pruned from files to files: which bytes are which layer, and where each goes.

`dimap._C` reads the weights to find the cuts, mostly once, and once more to write the output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _C
from .._dtypes import BY_CODE
from .._errors import way_out
from .._files import naming
from ..budgets import Solved, Weights
from ..distributed.ranks import Ranks
from ..groups import Slice, part_shape, whole, wholes
from ..groups.plan import Plan, kept_of
from ..report import Pruned, Report
from .base import Checkpoint, raw_bytes
from .bitmask import Format, Layout, compact_file, lay_out, read_layout, size_at_most
from .compact import Writer
from .header import DTYPES, Entry, Header, make_header, with_metadata
from .native import FILL, READ, Told, begin, elements, opened
from .shards import Shards

if TYPE_CHECKING:
    from torch import Tensor

ASIDE = 1 << 25  # numbers that may be set aside while the cuts are sought: 128 MiB


@dataclass(kw_only=True, repr=False)
class StreamPruning(Pruned):
    """What was pruned: `dimap.Pruning` without the weights and masks, which lie in files.

    modules, thresholds, scope, normalize, sparsity: as in `dimap.Pruning`.
    shapes, dtypes: of every parameter, "aux" included; dtypes as torch names them, "float32".
    kept: how many weights the masks keep, of every pruned parameter.
    nonzero: how many are not zero in the output, of every parameter, "aux" included.
    smallest: the smallest kept magnitude of a layer, under each of its parameters; none where
        nothing is kept.
    readings: how often the weights were read to find the cuts.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    kept: dict[str, int] = field(default_factory=dict)
    nonzero: dict[str, int] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    readings: int = 1
    summarize: Callable[[], Report] | None = field(default=None, repr=False, compare=False)

    def summary(self) -> Report:
        """The report with the checkpoint's notes, and FLOPs where the model is known."""
        return self.summarize() if self.summarize else self.report()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"summarize": None}  # which holds the checkpoint


def check_dtypes(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse weights that the engine cannot read."""
    if isinstance(checkpoint, Shards):
        checkpoint.check_dense()
    for name in wholes(plan.names):
        dtype = checkpoint.tensors[name].dtype
        if dtype.code not in BY_CODE:
            problem = f"{name} must be float32, bfloat16 or float16, got {dtype.name}"
            raise ValueError(problem + way_out(problem))


def nan_notes(names: Sequence[str]) -> list[str]:
    """What is said of tensors that are never pruned and hold a NaN: a model with one computes nothing."""
    if not names:
        return []
    if len(names) == 1:
        return [f"{names[0]}, which is never pruned, holds a NaN"]
    return [f"{len(names)} tensors that are never pruned hold a NaN, {names[0]} is the first"]


def check_agreement(shards: Shards, plan: Plan, settings: object, ranks: Ranks) -> None:
    """All ranks do the same job, or none does."""
    digest = hashlib.sha256(repr((plan.names, plan.layers, plan.scopes, settings)).encode())
    for shard in shards.shards:
        digest.update(shard.path.name.encode() + b"\0" + shard.header.raw)
    found = ranks.gather(digest.hexdigest())
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                "all ranks must be given the same checkpoint and settings, "
                f"got others on rank {rank} than on rank 0"
            )


def place_of(layout: Layout, entry: Entry, before: int = 0) -> tuple[int, int]:
    """Where the weights, or the values and the bits, of a tensor go in its output.

    before: values of the same parameter that stand before those of this slice of it.
    """
    place = layout.places[whole(entry.name)]
    size, count = entry.dtype.size, entry.numel()
    if place.bits is None:
        at = entry.name.at if isinstance(entry.name, Slice) else 0
        return place.values.begin + at * count * size, -1
    return place.values.begin + before * size, place.bits.begin + _skipped(entry.name, count)


def _skipped(name: str, size: int) -> int:
    """Bytes of bits in front of a slice's, of `size` weights."""
    return name.at * size // 8 if isinstance(name, Slice) else 0


class Stream:
    """One pruning from files to files, by one rank or by several."""

    def __init__(
        self,
        checkpoint: Shards,
        plan: Plan,
        ranks: Ranks,
        told: Told,
        norms: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """norms: what the magnitudes are multiplied with to be ranked, checked and by parameter.

        metadata: what the outputs say beside what the inputs do.
        """
        self.checkpoint, self.plan, self.ranks, self.told = checkpoint, plan, ranks, told
        self.norms: list[tuple[memoryview, int]] = []
        if norms is not None:
            shapes = checkpoint.shapes()
            self.norms = [_norms_of(n, part_shape(shapes, n), norms[whole(n)]) for n in plan.names]
        self.shards = checkpoint.shards
        # Of the dense outputs.
        self.headers = [with_metadata(s.header, metadata or {}, str(s.path)) for s in self.shards]
        located = {
            e.name: (file, e) for file, s in enumerate(self.shards) for e in s.header.entries
        }
        self.tensors = [(located[whole(n)][0], located[whole(n)][1].part(n)) for n in plan.names]
        for name in wholes(plan.names):
            del located[name]
        self.others = list(located.values())  # alike on all ranks
        # Of each tensor: values of its parameter before its own.
        self.before = [0] * len(plan.names)
        self.surveys = 0

    def weights(self) -> Weights:
        """The weights of all ranks, for budgets and limits."""
        codes = ["F32" if self.norms else entry.dtype.code for _, entry in self.tensors]
        bits = [BY_CODE[code].zero_bits for code in codes]
        return Weights(self.plan, bits, self._survey, dense=bool(self.norms))

    def _survey(self, rows: Mapping[int, int], windows: bytes, bins: int) -> bytes:
        self.surveys += 1
        with opened(self.checkpoint.files, READ) as files, self._naming(list(rows)):
            return _C.survey(
                files,
                [(*self._place(i), row) for i, row in rows.items()],
                windows,
                bins,
                rank=self.ranks.rank,
                size=self.ranks.size,
                exchange=self.ranks.exchange if self.ranks.size > 1 else None,
                progress=self.told,
                norms=[self.norms[i] for i in rows] if self.norms else [],
            )

    def _place(self, tensor: int) -> tuple[int, int, int, int]:
        """What the engine is told of a tensor: file, offset, weights, dtype."""
        file, entry = self.tensors[tensor]
        return file, entry.begin, entry.numel(), BY_CODE[entry.dtype.code].number

    @contextmanager
    def _naming(self, numbers: Sequence[int]) -> Iterator[None]:
        """Say the names of tensors where the engine's errors say their numbers."""
        try:
            yield
        except _C.NonFiniteError as error:
            number, index, kind = error.args
            name = self.plan.names[numbers[number]]
            whose = f"saliency of {name}" if self.norms else name
            problem = f"{whose} must be finite, got {kind} at flat index {index}"
            raise ValueError(problem + way_out(problem)) from error
        except _C.ChangedError as error:
            file, entry = self.tensors[numbers[error.args[0]]]
            raise ValueError(
                f"{self.shards[file].path}: {entry.name} must not change while it is read"
            ) from error

    def fill(
        self,
        solved: Solved,
        form: Format,
        targets: list[Path],
        masks: Path | None,
        result: StreamPruning,
    ) -> None:
        """Decide and write this rank's part, and complete the result with the counts of all ranks."""
        plan, ranks = solved.plan, self.ranks
        with ExitStack() as files, self._naming(range(len(self.tensors))):
            inputs = files.enter_context(opened(self.checkpoint.files, READ))
            engine, keep = self._decide(inputs, solved, result)
            layouts = self._lay_out(engine, form)
            outputs: list[tuple[int, str]] = []
            writers: list[Writer] = []
            takes: list[tuple[int, str]] | _C.Piece
            if form == "compact":
                for target, header, shard in zip(targets, self.headers, self.shards, strict=True):
                    writer = compact_file(target, header, str(shard.path))
                    writers.append(files.enter_context(writer))

                def takes(file: int, at: int, data: memoryview) -> None:
                    writers[file].put(at, data)

            else:
                takes = outputs = files.enter_context(opened(targets, FILL))
                for output, layout in zip(outputs, layouts, strict=True):
                    begin(output, layout.header, first=ranks.rank == 0)
            masks_at = None
            if masks is not None:
                (output,) = files.enter_context(opened([masks], FILL))
                header = masks_header(plan, result)
                begin(output, header, first=ranks.rank == 0)
                begins = {entry.name: entry.begin for entry in header.entries}
                sizes = zip(plan.names, plan.sizes, strict=True)
                masks_at = (
                    *output,
                    [begins[whole(n)] + _skipped(n, size) for n, size in sizes],
                )
                outputs = [*outputs, output]
            nonzero_others = engine.write(
                takes,
                [
                    place_of(layouts[file], entry, before)
                    for (file, entry), before in zip(self.tensors, self.before, strict=True)
                ],
                [
                    (file, *elements(e), layouts[file].places[e.name].values.begin, e.dtype.most)
                    for file, e in self.others
                ],
                masks=masks_at,
            )
            headers = [writer.finish() for writer in writers] or [x.header for x in layouts]
            self.told.finish()
            if ranks.rank > 0:  # what rank 0 brings to the disk need not be what others wrote
                for descriptor, path in outputs:
                    with naming(Path(path)):
                        os.fsync(descriptor)
        self._add_up(engine, nonzero_others, solved, keep, result)
        if form != "dense" and ranks.rank == 0:
            self.checkpoint.write_index(targets, headers, packed=True)

    def _decide(
        self, inputs: list[tuple[int, str]], solved: Solved, result: StreamPruning
    ) -> tuple[_C.Pruning, list[int]]:
        """The engine, once it knows what is kept, and how many of each scope.

        With groups, the result is told which N they have.
        """
        plan, ranks = solved.plan, self.ranks
        module_of = dict(zip(plan.layers, plan.scopes, strict=True))

        def decide(*patterns: tuple[int, int, int]) -> _C.Pruning:
            engine = _C.Pruning(
                inputs,
                [(*self._place(i), layer) for i, layer in enumerate(plan.layers)],
                [module_of[layer] for layer in range(len(module_of))],
                solved.keep,
                rank=ranks.rank,
                size=ranks.size,
                exchange=ranks.exchange if ranks.size > 1 else None,
                progress=self.told,
                aside=ASIDE,
                patterns=patterns,
                norms=self.norms,
            )
            engine.decide()
            return engine

        rows = (
            [
                (kept_of(n, share), max(n, 1), max(inner, 1))
                for (_, n, inner), share in zip(
                    plan.rows, plan.of_rows(solved.sparsity), strict=True
                )
            ]
            if plan.rows
            else []
        )
        if plan.nm is None:
            return decide(*rows), solved.keep
        counts = plan.counts(decide(*rows).kept if plan.nm.n is None else ())
        m, kept = plan.nm.m, plan.by_tensor(counts)
        result.nm = {name: f"{n}:{m}" for name, n in counts.items()}
        keep = [0] * len(solved.keep)
        for n, size, scope in zip(kept, plan.sizes, plan.scopes, strict=True):
            keep[scope] += size // m * n
        return decide(
            *((n, m, max(inner, 1)) for n, inner in zip(kept, plan.inners, strict=True))
        ), keep

    def packed_size(self, values: Mapping[str, int]) -> int:
        """Bytes of the bitmask files, if the pruned parameters have so many values at most."""
        return sum(
            size_at_most(h, {n: values[n] for n in s.entries if n in values}, str(s.path))
            for h, s in zip(self.headers, self.shards, strict=True)
        )

    def _lay_out(self, engine: _C.Pruning, form: Format) -> list[Layout]:
        """What goes where in the outputs."""
        if form != "bitmask":
            sides = zip(self.headers, self.shards, strict=True)
            return [read_layout(header, str(shard.path)) for header, shard in sides]
        packed: dict[str, int] = {}
        for i, (name, count) in enumerate(zip(self.plan.names, engine.count_packed(), strict=True)):
            self.before[i] = packed.get(whole(name), 0)
            packed[whole(name)] = self.before[i] + count
        return [
            lay_out(h, {n: packed[n] for n in s.entries if n in packed}, str(s.path))
            for h, s in zip(self.headers, self.shards, strict=True)
        ]

    def _add_up(
        self,
        engine: _C.Pruning,
        nonzero_others: list[int],
        solved: Solved,
        keep: list[int],
        result: StreamPruning,
    ) -> None:
        """Complete the result, once it is sure that exactly what was asked for is kept."""
        plan = solved.plan
        result.readings = self.surveys + engine.readings
        if plan.nm is None and not plan.rows:
            thresholds = dict(zip(plan.scope_names, engine.thresholds, strict=True))
            result.thresholds = solved.thresholds or thresholds
        result.kept = dict(zip(plan.names, engine.kept, strict=True))
        kept = [0] * len(keep)
        for scope, count in zip(plan.scopes, engine.kept, strict=True):
            kept[scope] += count
        for name, want, got in zip(plan.scope_names, keep, kept, strict=True):
            if want != got:
                raise ValueError(f"{name} must keep {want} weights, got {got}")
        told = self.ranks.gather((engine.nonzero, nonzero_others, engine.smallest, engine.nan))
        # Of each tensor, what the ranks say.
        mine, others, smallest, nan = (
            list(zip(*ranks, strict=True)) for ranks in zip(*told, strict=True)
        )
        entries = [entry for _, entry in self.others]
        odd = [entry.name for entry, found in zip(entries, nan, strict=True) if any(found)]
        result.notes += nan_notes(odd)
        nonzero = dict(zip(plan.names, map(sum, mine), strict=True))
        for entry, counts in zip(entries, others, strict=True):
            nonzero[entry.name] = sum(counts) if entry.dtype.size else entry.numel()
        for name in plan.names:
            if isinstance(name, Slice):
                for counted in (nonzero, result.kept):
                    counted[name.parameter] = counted.get(name.parameter, 0) + counted[name]
        result.nonzero = {name: nonzero[name] for name in result.shapes}
        least = dict(zip(plan.names, smallest, strict=True))
        for _, layer in plan.prunable():
            found = [v for p in layer.parameters for v in least[p] if not math.isnan(v)]
            if found:
                result.smallest.update(dict.fromkeys(layer.parameters, min(found)))


def _norms_of(name: str, shape: Sequence[int], norms: Tensor) -> tuple[memoryview, int]:
    """What `_C` is given: norms of neighbouring dimensions, float32, and the weights behind these."""
    if isinstance(name, Slice):
        norms = norms[name.at if len(norms) > 1 else 0]
    wide = [d for d, size in enumerate(norms.shape) if size > 1]
    first, end = (wide[0], wide[-1] + 1) if wide else (0, 0)
    values = norms.expand([n if first <= d < end else -1 for d, n in enumerate(shape)])
    return raw_bytes(values), max(1, math.prod(shape[end:]))


def masks_header(plan: Plan, result: StreamPruning) -> Header:
    """The header of the file that `dimap.save_masks` would write."""
    shapes = {name: list(result.shapes[name]) for name in wholes(plan.names)}
    settings = result.mask_metadata() | {"dimap_masks": "1", "shapes": json.dumps(shapes)}
    described = [(n, DTYPES["U8"], [(math.prod(shape) + 7) // 8]) for n, shape in shapes.items()]
    return make_header(described, settings, "the file of masks")
