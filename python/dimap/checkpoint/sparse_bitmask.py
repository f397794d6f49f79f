"""Checkpoints that compressed-tensors wrote in its `sparse-bitmask` format: read, to be made dense.

Of a matrix NAME.weight such a file holds, beside the tensors that it stores as they are:

    NAME.compressed   [values]             the values that are not zero, in order
    NAME.bitmask      uint8 [rows, bytes]  a bit for each weight as in docs/format.md, but each row begins
                                           with a byte of its own
    NAME.row_offsets  int64 [rows]         the values before each row
    NAME.shape        int64 [2]            rows and columns

in the same shard or in several. Where NAME ends in "weight" or "bias" already it is the whole name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from struct import unpack
from typing import NamedTuple

from .header import DType, Entry, Header, make_header, refuse
from .native import READ, opened, read_fully
from .shards import COMPRESSED, PARTS, Shards

SETTINGS = ("quantization_config", "compression_config")  # in config.json
STEP = 1 << 20  # bytes of bits that are counted at a time

Source = tuple[int, str]


class Stored(NamedTuple):
    """An entry of a file, and the file."""

    file: int
    entry: Entry


class Packed(NamedTuple):
    """One of the tensors. jobs: what `_C.expand` is given of it, without its place in the output."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    jobs: list[tuple[int, int, int, int, int, int, int]]


class SparseBitmask:
    """What makes a checkpoint of this format dense.

    headers: of the dense files. packed, names, rest: what `_C.expand` is given, and of each `packed`
        the tensor, for errors.
    """

    def __init__(self, checkpoint: Shards) -> None:
        self.headers: list[Header] = []
        self.packed: list[tuple[int, int, int, int, int, int, int, int]] = []
        self.names: list[str] = []
        self.rest: list[tuple[int, int, int, int]] = []
        self._checkpoint = checkpoint
        stored = {
            e.name: Stored(f, e) for f, s in enumerate(checkpoint.shards) for e in s.header.entries
        }
        prefixes = checkpoint.foreign
        gone = {prefix + part for prefix in prefixes for part in (COMPRESSED, *PARTS)}
        with opened([shard.path for shard in checkpoint.shards], READ) as sources:
            found = {p + COMPRESSED: _read(p, stored, sources) for p in prefixes}
        names = Counter([t.name for t in found.values()] + [n for n in stored if n not in gone])
        for name, times in names.items():
            if times > 1:
                refuse(checkpoint.path, f"hold {name} once", "it twice")
        for file, shard in enumerate(checkpoint.shards):
            kept = [e for e in shard.header.entries if e.name in found or e.name not in gone]
            described = [
                (t.name, t.dtype, t.shape)
                if (t := found.get(e.name))
                else (e.name, e.dtype, e.shape)
                for e in kept
            ]
            described.sort(key=lambda tensor: -tensor[1].bits)  # so every tensor lies aligned
            self.headers.append(make_header(described, shard.header.metadata, str(shard.path)))
            places = {entry.name: entry.begin for entry in self.headers[-1].entries}
            for entry in kept:
                if packed := found.get(entry.name):
                    at = places[packed.name]
                    for job in packed.jobs:
                        self.packed.append((*job, at))
                        at += job[5] * job[6]
                    self.names += [f"{shard.path}: {entry.name}"] * len(packed.jobs)
                else:
                    self.rest.append((file, entry.begin, entry.nbytes, places[entry.name]))

    def finish(self, targets: Sequence[Path]) -> None:
        """Say in the other files of a folder that it is dense."""
        checkpoint = self._checkpoint
        checkpoint.write_index(targets, self.headers)
        config = targets[0].with_name("config.json")
        if not checkpoint.is_folder or not config.is_file():
            return
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{checkpoint.path}: config.json must be JSON ({error})") from error
        for key in SETTINGS:
            told = settings.get(key) if isinstance(settings, dict) else None
            if isinstance(told, dict) and told.pop("sparsity_config", None) is not None:
                if not told.get("config_groups"):  # which tell how tensors are quantized
                    del settings[key]
                config.unlink()  # it may be read-only like the original
                config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read(prefix: str, stored: dict[str, Stored], sources: list[Source]) -> Packed:
    """One tensor, its parts checked to fit each other."""
    values, bits, offsets, told = (stored[prefix + part] for part in (COMPRESSED, *PARTS))

    def what(part: Stored) -> str:
        return f"{sources[part.file][1]}: {part.entry.name}"

    if (
        told.entry.dtype.code != "I64"
        or len(told.entry.shape) != 1
        or not 0 < told.entry.nbytes <= 512
    ):
        refuse(what(told), "be sizes, int64 in one dimension", _spec(told))
    shape = unpack(f"<{told.entry.numel()}q", _bytes(told, sources))
    *rows, columns = shape
    width = (columns + 7) // 8
    if min(shape) < 0 or bits.entry.dtype.code != "U8" or bits.entry.shape != (*rows, width):
        refuse(what(bits), f"be uint8 {[*rows, width]} for shape {list(shape)}", _spec(bits))
    if offsets.entry.dtype.code != "I64" or offsets.entry.shape != tuple(rows):
        refuse(what(offsets), f"be int64 {rows} for shape {list(shape)}", _spec(offsets))
    if not values.entry.dtype.size or len(values.entry.shape) != 1:
        refuse(what(values), "be elements of whole bytes in one dimension", _spec(values))
    counts = _count_rows(bits, width, sources)
    if (ones := sum(counts)) != values.entry.numel():
        required = f"have as many values as its bits say, {ones}"
        refuse(what(values), required, values.entry.numel())
    if len(shape) == 2 and columns:
        begins = list(accumulate(counts, initial=0))[:-1]
        if list(unpack(f"<{len(begins)}q", _bytes(offsets, sources))) != begins:
            refuse(what(offsets), "be where the values of each row begin", "others")
    size = values.entry.dtype.size
    if columns % 8 == 0:  # no bits are unused: it is as if there were one row
        counts, columns, width = [ones] if bits.entry.nbytes else [], columns * len(counts), 0
    jobs, first = [], values.entry.begin
    for row, count in enumerate(counts):
        at = bits.entry.begin + row * width
        jobs.append((values.file, first, count, bits.file, at, columns, size))
        first += count * size
    whole = prefix.rpartition(".")[2] in ("weight", "bias")
    return Packed(prefix if whole else f"{prefix}.weight", values.entry.dtype, shape, jobs)


def _count_rows(bits: Stored, width: int, sources: list[Source]) -> list[int]:
    """The ones in each row."""
    counts: list[int] = []
    step = max(STEP // max(width, 1), 1) * width
    for at in range(bits.entry.begin, bits.entry.end, step or 1):
        data = read_fully(sources[bits.file], min(step, bits.entry.end - at), at)
        rows = (data[i : i + width] for i in range(0, len(data), width))
        counts += [int.from_bytes(row, "little").bit_count() for row in rows]
    return counts


def _bytes(part: Stored, sources: list[Source]) -> bytes:
    return read_fully(sources[part.file], part.entry.nbytes, part.entry.begin)


def _spec(part: Stored) -> str:
    return f"{part.entry.dtype} {list(part.entry.shape)}"
