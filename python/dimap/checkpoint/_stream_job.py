"""One checkpoint pruned from files to files, or one rank's part of it, by the engine in C++.

Python says which bytes are which layer, and where they go; what it gets are counts and thresholds.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from .. import _C
from ..distributed.ranks import Ranks
from ..groups import AUX, Patterns
from ..groups.plan import Normalize, Plan, Scope
from ._bitmask_layout import Layout, lay_out, size_of
from ._header import Entry, Header, element
from ._masks import lay_out_masks
from ._safetensors import Shards
from ._stream_types import Progress, StreamPruning

ASIDE = 1 << 25  # numbers that the engine may set aside between its readings: 128 MiB
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # the engine's numbers of what it prunes


class _Home(NamedTuple):
    """Where a tensor lies: the number of its file, and its entry there."""

    file: int
    entry: Entry


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
        self.sources: list[tuple[Path, Header]] = [(s.path, s.header) for s in checkpoint.shards]
        self.homes = {
            entry.name: _Home(file, entry)
            for file, (_, header) in enumerate(self.sources)
            for entry in header.entries
        }
        shapes = {name: home.entry.shape for name, home in self.homes.items()}
        self.plan = Plan.of_shapes(shapes, scope, normalize, patterns)
        self.keep = self.plan.keep(sparsity)
        for name in self.plan.names:
            if (got := _name(self.homes[name].entry)) not in _DTYPES:
                raise ValueError(f"{name} must be float32, bfloat16 or float16, got {got}")
        self.progress, self.ranks = progress, ranks
        names = [p for layers in self.plan.modules.values() for x in layers for p in x.parameters]
        self.result = StreamPruning(
            modules=self.plan.modules,
            thresholds={},
            scope=scope,
            normalize=normalize,
            sparsity=self.plan.ratios(sparsity),
            shapes={name: shapes[name] for name in names},
            dtypes={name: self.homes[name].entry.dtype for name in names},
            kept={},
            nonzero=dict.fromkeys(names, 0),
        )

    def check_agreement(self, *settings: object) -> None:
        """All ranks do the same job, or none does."""
        words = (self.plan.names, self.plan.layers, self.plan.scopes, self.keep, settings)
        digest = hashlib.sha256(repr(words).encode())
        for path, header in self.sources:
            digest.update(path.name.encode() + b"\0" + header.raw)
        found = self.ranks.gather(digest.hexdigest())
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    "all ranks must be given the same checkpoint and settings, "
                    f"got others on rank {rank} than on rank 0"
                )

    def run(
        self, targets: Sequence[Path], masks: Path | None, *, bitmask: bool = False
    ) -> StreamPruning:
        """Find the cuts and fill the targets, empty files that exist; `masks` too."""
        paths = [path for path, _ in self.sources]
        with ExitStack() as stack:
            files = stack.enter_context(opened(paths, os.O_RDONLY))
            stack.enter_context(self._naming())
            pruning = self._decide(files)
            layouts = self._lay_out(pruning) if bitmask else None
            headers = [lay.header for lay in layouts] if layouts else [h for _, h in self.sources]
            outputs = stack.enter_context(opened(targets, os.O_RDWR))
            for (output, _), header in zip(outputs, headers, strict=True):
                os.ftruncate(output, size_of(header))
                os.pwrite(output, header.raw, 0)
            mask_file: tuple[int, str, list[int]] | None = None
            if masks is not None:
                places, raw, size = lay_out_masks(self.plan.names, self.result)
                ((mask, path),) = stack.enter_context(opened([masks], os.O_RDWR))
                os.ftruncate(mask, size)
                os.pwrite(mask, raw, 0)
                mask_file = mask, path, [places[name] for name in self.plan.names]
            pruned = set(self.plan.names)
            rest = [home for name, home in self.homes.items() if name not in pruned]
            counts = pruning.write(
                outputs,
                [self._place(name, layouts) for name in self.plan.names],
                [self._rest(home, layouts) for home in rest],
                masks=mask_file,
            )
            if self.ranks.rank > 0:  # what rank 0 brings to the disk need not be what others wrote
                for descriptor in [d for d, _ in outputs] + ([mask_file[0]] if mask_file else []):
                    os.fsync(descriptor)
        self._add_up(pruning, {home.entry.name: n for home, n in zip(rest, counts, strict=True)})
        return self.result

    def _decide(self, files: Sequence[tuple[int, str]]) -> _C.Pruning:
        plan = self.plan
        homes = [self.homes[name] for name in plan.names]
        tensors = [
            (h.file, h.entry.begin, math.prod(h.entry.shape), _DTYPES[_name(h.entry)], layer)
            for h, layer in zip(homes, plan.layers, strict=True)
        ]
        modules = dict(zip(plan.layers, plan.scopes, strict=True))
        pruning = _C.Pruning(
            files,
            tensors,
            [modules[layer] for layer in range(len(modules))],
            self.keep,
            rank=self.ranks.rank,
            size=self.ranks.size,
            exchange=self._sum if self.ranks.size > 1 else None,
            progress=told(self.progress),
            aside=ASIDE,
        )
        pruning.decide()
        self.result.readings = pruning.readings
        self.result.kept = dict(zip(plan.names, pruning.kept, strict=True))
        self.result.thresholds = dict(zip(plan.scope_names, pruning.thresholds, strict=True))
        return pruning

    def _sum(self, numbers: memoryview) -> None:
        """The engine's exchange."""
        import torch

        mine = torch.frombuffer(numbers, dtype=torch.int64)
        mine.copy_(self.ranks.sum(mine))

    def _lay_out(self, pruning: _C.Pruning) -> list[Layout]:
        """Of bitmask files: how many values each tensor has is known before any is written."""
        values = dict(zip(self.plan.names, pruning.count_packed(), strict=True))
        return [
            lay_out(header, {e.name: values[e.name] for e in header.entries if e.name in values}, str(path))
            for path, header in self.sources
        ]  # fmt: skip

    def _place(self, name: str, layouts: Sequence[Layout] | None) -> tuple[int, int]:
        file, entry = self.homes[name]
        if layouts is None:
            return entry.begin, -1
        place = layouts[file].places[name]
        return place.values.begin, -1 if place.bits is None else place.bits.begin

    def _rest(
        self, home: _Home, layouts: Sequence[Layout] | None
    ) -> tuple[int, int, int, int, int, int]:
        file, entry = home
        size, mask = element(entry.dtype)
        begin = entry.begin if layouts is None else layouts[file].places[entry.name].values.begin
        return file, entry.begin, (entry.end - entry.begin) // size, size, mask, begin

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Say in words what the engine says in numbers."""
        names = self.plan.names
        try:
            yield
        except _C.NonFiniteError as error:
            number, index, kind = error.args
            raise ValueError(
                f"{names[number]} must be finite, got {kind} at flat index {index}"
            ) from error
        except _C.ChangedError as error:
            raise ValueError(
                f"the input must not change while it is read: {names[error.args[0]]} has other "
                "weights than when its mask was decided"
            ) from error

    def _add_up(self, pruning: _C.Pruning, rest: dict[str, int]) -> None:
        """Counts of all ranks."""
        nonzero = dict(zip(self.plan.names, pruning.nonzero, strict=True)) | rest
        smallest = dict(zip(self.plan.names, pruning.smallest, strict=True))
        found = self.ranks.gather((nonzero, smallest))
        for name in self.result.nonzero:
            self.result.nonzero[name] = sum(counts[name] for counts, _ in found)
        for module, layers in self.plan.modules.items():
            for layer in layers if module != AUX else []:
                seen = [least[p] for _, least in found for p in layer.parameters]
                if kept := [value for value in seen if not math.isnan(value)]:
                    self.result.smallest.update(dict.fromkeys(layer.parameters, min(kept)))


@contextmanager
def opened(paths: Sequence[Path], flags: int) -> Iterator[list[tuple[int, str]]]:
    """Descriptors of files that exist, with their paths: what the engine takes.

    Outputs are never created: rank 0 may have given up and removed them by now.
    """
    found: list[tuple[int, str]] = []
    try:
        for path in paths:
            follow = 0 if flags == os.O_RDONLY else getattr(os, "O_NOFOLLOW", 0)
            found.append((os.open(path, flags | os.O_CLOEXEC | follow), str(path)))
        yield found
    finally:
        for descriptor, _ in found:
            os.close(descriptor)


def told(progress: Progress) -> Callable[[str, int, int], None]:
    """What the engine says of its progress, as steps that advance."""
    last: list[object] = [None, 0]

    def say(step: str, done: int, total: int) -> None:
        if step != last[0] or done < int(str(last[1])):
            progress.step(step, total)
            last[:] = step, 0
        progress.advance(done - int(str(last[1])))
        last[1] = done

    return say


def _name(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")
