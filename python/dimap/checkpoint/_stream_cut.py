"""From pieces of tensors to each layer's cut: sample, survey, solve, as often as it takes.

Usually once: the guessed windows hold the cuts. 16-bit weights have one magnitude in a bin, so the
table decides; of float32 weights those inside the windows are set aside, and decide in memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..distributed.ranks import Ranks
from ..groups._plan import Plan
from ._header import Entry
from ._stream_guess import (
    BINS,
    RUN,
    RUNS,
    SHARE,
    WHOLE,
    Keys,
    Sketch,
    guess,
    keys_of,
    merge,
    sketch,
)
from ._stream_io import Block, Buffer, Piece, Source, read_into
from ._stream_notes import Note, Notes, keys_inside
from ._stream_part import Part
from ._stream_threads import each
from ._stream_types import Progress

GRAINS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
HEAD = 22  # columns of a table before its bins
TABLES = 8 << 20  # bytes of all tables of a survey, about
SURVEY_BINS = 4096  # at most


@dataclass
class ScopeState:
    """One threshold: the layers that it cuts. Fields by layer follow the order of `layers`."""

    layers: list[int]
    totals: list[int]
    grains: list[int]
    keep: int
    windows: Tensor
    looked: Tensor | None = None  # the windows of the last survey
    table: Tensor | None = None
    decided: bool = False
    quota: int = 0
    threshold: float = float("nan")
    cuts: list[list[int]] = field(default_factory=list)
    noted: bool = True  # what lies in the windows is noted


class Cutter:
    """Finds the cuts of a plan whose tensors lie in files, or partly in those of other ranks."""

    def __init__(
        self,
        plan: Plan,
        keep: Sequence[int],
        sources: Sequence[Source],
        descriptors: Sequence[int],
        part: Part,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self.plan, self.sources, self.descriptors = plan, sources, descriptors
        self.part, self.ranks, self.progress = part, ranks, progress
        self.number = {name: i for i, name in enumerate(plan.names)}
        self.layer_of = plan.layers
        self.notes = Notes()
        self.readings = 0
        self._lock = threading.Lock()
        layers: dict[int, list[int]] = {}
        for i, layer in enumerate(plan.layers):
            layers.setdefault(layer, []).append(i)
        self.members = layers
        self.scopes: list[ScopeState] = []
        self.place: dict[int, tuple[int, int]] = {}  # layer -> scope, row in it
        for s, count in enumerate(keep):
            mine = list(
                dict.fromkeys(x for x, y in zip(plan.layers, plan.scopes, strict=True) if y == s)
            )
            for row, layer in enumerate(mine):
                self.place[layer] = s, row
            totals = [sum(plan.tensors[i].numel() for i in layers[x]) for x in mine]
            grains = [min(GRAINS[plan.tensors[i].dtype] for i in layers[x]) for x in mine]
            self.scopes.append(ScopeState(mine, totals, grains, count, torch.zeros(0)))

    def run(self) -> None:
        """Decide every scope."""
        self._guess()
        bins = BINS
        while True:
            self._survey(bins)
            for scope in self.scopes:
                if not scope.decided:
                    self._solve(scope, bins)
            left = [scope for scope in self.scopes if not scope.decided]
            if not left:
                return
            stuck = any(torch.equal(s.windows, s.looked) for s in left if s.looked is not None)
            fit = TABLES // (24 * sum(len(scope.layers) for scope in left))
            bins = bins * 8 if stuck else max(BINS, min(fit, SURVEY_BINS))

    # The sample

    def _guess(self) -> None:
        found: dict[int, list[Sketch]] = {}
        mine = [
            (entry, file)
            for file, source in enumerate(self.sources)
            for entry in source.header.entries
            if entry.name in self.number and self.part.owns(file, entry.begin)
        ]

        def take(item: tuple[Any, int], buffer: Buffer) -> None:
            entry, file = item
            i = self.number[entry.name]
            s, row = self.place[self.layer_of[i]]
            scope = self.scopes[s]
            count = (entry.end - entry.begin) // entry.dtype.itemsize
            if count == 0 or scope.keep == 0:
                return
            total = scope.totals[row]
            ratio = scope.keep / max(sum(scope.totals), 1)
            whole = total <= WHOLE
            if whole:
                places, run = [0], count
            else:
                runs = min(max(total // (SHARE * RUN), RUNS.start), RUNS.stop) * count / total
                run = min(RUN, count)
                rng = np.random.default_rng(i)
                n = max(round(runs), 1)
                places = ((np.arange(n) + rng.random(n)) / n * (count - run)).astype(int).tolist()
            keys = self._read_runs(file, entry, places, run)
            part = sketch(keys, ratio, whole=whole)
            with self._lock:
                found.setdefault(self.layer_of[i], []).append(part)

        each(mine, take)
        parts: dict[int, list[Sketch]] = {}
        for other in self.ranks.gather(found):
            for layer, sketches in other.items():
                parts.setdefault(layer, []).extend(sketches)
        nothing = sketch(np.zeros(0, np.uint32), 0.0, whole=True)
        for scope in self.scopes:
            sketches = [merge(parts.get(layer, [nothing])) for layer in scope.layers]
            scope.windows = guess(sketches, scope.totals, scope.grains, scope.keep)

    def _read_runs(self, file: int, entry: Entry, places: Sequence[int], run: int) -> Keys:
        """The keys of weights [p, p + run) for each place p: [places, run]."""
        width = run * entry.dtype.itemsize
        memory = bytearray(len(places) * width)
        view, path = memoryview(memory), self.sources[file].path
        for i, place in enumerate(places):
            begin = entry.begin + place * entry.dtype.itemsize
            read_into(self.descriptors[file], view[i * width : (i + 1) * width], begin, path)
        return keys_of(torch.frombuffer(memory, dtype=entry.dtype)).reshape(len(places), run)

    # The survey

    def _survey(self, bins: int) -> None:
        self.readings += 1
        wanted = [s for s in self.scopes if not s.decided]
        for scope in wanted:
            scope.table = torch.zeros(len(scope.layers), HEAD + 3 * bins, dtype=torch.int64)
            scope.looked, scope.noted = scope.windows.clone(), True
        for scope in wanted:
            self._forget(scope)
        pieces = [
            piece
            for file, source in enumerate(self.sources)
            for piece in self.part.pieces(
                file, [e for e in source.header.entries if self._open(e.name)]
            )
        ]
        self.progress.step("surveying", sum(piece.end - piece.begin for piece in pieces))
        each(pieces, lambda piece, buffer: self._survey_piece(piece, buffer, bins))
        tables = [scope.table for scope in wanted if scope.table is not None]
        total = self.ranks.sum(torch.cat(tables)).split([len(table) for table in tables])
        for scope, table in zip(wanted, total, strict=True):
            scope.table = table
        noted = self.ranks.gather([scope.noted for scope in self.scopes])
        for s, scope in enumerate(self.scopes):
            scope.noted = all(flags[s] for flags in noted)
            if not scope.noted:
                self._forget(scope)

    def _forget(self, scope: ScopeState) -> None:
        for layer in scope.layers:
            self.notes.forget(layer)

    def _open(self, name: str) -> bool:
        i = self.number.get(name)
        return i is not None and not self.scopes[self.plan.scopes[i]].decided

    def _survey_piece(self, piece: Piece, buffer: Buffer, bins: int) -> None:
        buffer.read(
            self.descriptors[piece.file], piece.begin, piece.end, self.sources[piece.file].path
        )
        tensors = [buffer.tensor(block, piece) for block in piece.blocks]
        numbers = [self.number[block.entry.name] for block in piece.blocks]
        places = [self.place[self.layer_of[i]] for i in numbers]
        windows = torch.stack([self.scopes[s].windows[row] for s, row in places])
        with _named(piece.blocks):
            table = ops.survey(tensors, range(len(tensors)), windows, bins)
        counts = table[:, HEAD::3].numpy()
        for k, (block, (s, row)) in enumerate(zip(piece.blocks, places, strict=True)):
            scope = self.scopes[s]
            base, shift = windows[k, :2].tolist()
            note = None
            window, above = (base, base + (bins << shift)), int(table[k, 1])
            if shift > scope.grains[row]:
                # A bin holds many magnitudes: what is in the window may decide.
                inside = int(counts[k].sum())
                if not self.notes.have_room(inside):
                    scope.noted = False
                elif scope.noted:
                    keys = keys_inside(tensors[k], base, bins << shift, inside)
                    note = Note(keys, None, window, above)
            else:
                full = np.flatnonzero(counts[k])
                if self.notes.have_room(len(full)):
                    keys = (base + (full << shift)).astype(np.uint32)
                    note = Note(keys, counts[k][full].astype(np.int32), window, above)
            with self._lock:
                assert scope.table is not None
                scope.table[row] += table[k]
                if note is not None:
                    self.notes.add(scope.layers[row], numbers[k], block.start, note)
        self.progress.advance(piece.end - piece.begin)

    # The solution

    def _solve(self, scope: ScopeState, bins: int) -> None:
        """Decide a scope from its table and what was set aside, or say where to look next."""
        assert scope.table is not None
        assert scope.looked is not None
        outside = scope.table.clone()
        ends = scope.looked[:, 0] + (bins << scope.looked[:, 1])
        fine = scope.looked[:, 1] <= torch.tensor(scope.grains)  # one magnitude in a bin
        while True:
            cuts, quota, thresholds, closer = ops.solve(
                scope.table, scope.windows, [0] * len(scope.layers), [scope.keep]
            )
            if int(quota[0]) >= 0:
                scope.cuts, scope.quota, scope.decided = cuts.tolist(), int(quota[0]), True
                scope.threshold = float(thresholds[0])
                return
            before, scope.windows = scope.windows, closer
            if not scope.noted:
                return
            # What is set aside is all that the survey's windows held: stay inside them.
            inner = closer.clone()
            inner[:, 0] = torch.minimum(inner[:, 0], ends - (bins << inner[:, 1]))
            inner[fine] = scope.looked[fine]
            if (inner[:, 0] < scope.looked[:, 0]).any() or torch.equal(inner, before):
                return
            scope.windows = inner
            keys: list[Tensor] = []
            numbers: list[int] = []
            for row, layer in enumerate(scope.layers):
                if not fine[row]:
                    keys += (note.floats() for note in self.notes.of(layer).values())
                    numbers += [row] * (len(keys) - len(numbers))
            narrow = inner.clone()
            narrow[:, 2] = 0  # what is set aside is float32
            table = self.ranks.sum(ops.survey(keys, numbers, narrow, bins))
            table[:, 0] = outside[:, 0]
            table[:, 1:HEAD] += outside[:, 1:HEAD]
            table[fine] = outside[fine]
            scope.table = table


@contextmanager
def _named(blocks: Sequence[Block]) -> Iterator[None]:
    """Name tensor and place where an operator's error speaks of ``weights[3]``."""
    try:
        yield
    except RuntimeError as error:
        message = str(error).split("\n")[0]
        found = re.search(r"weights\[(\d+)\] must be", message)
        if found is None:
            raise
        block = blocks[int(found[1])]
        # What torch puts before the message (function, file and line) is left behind.
        message = message[found.start() :].replace(f"weights[{found[1]}]", block.entry.name)
        at = re.search(r"flat index (\d+)", message)
        if at is not None:
            message = message.replace(at[0], f"flat index {int(at[1]) + block.start}")
        raise ValueError(message) from error
