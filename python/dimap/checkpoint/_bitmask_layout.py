"""Where a bitmask file keeps what: its header from that of the dense file, and back.

The format is written down in docs/format.md. What a file says of itself is checked in full before
any of it is used; what does not fit, or is of another version, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import NamedTuple

import torch

from ._header import DTYPES, MOST, Entry, Header, parse_header

VERSION = "1"
VERSION_KEY = "dimap_bitmask"  # metadata of a bitmask file
DENSE_KEY = "dimap_dense"  # metadata: the dense file's header; of an index: the dense one's text
BITS = ".bitmask"  # ends the name of a tensor's bits
PACKED = (torch.float32, torch.bfloat16, torch.float16)
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Place(NamedTuple):
    """What the file keeps of a tensor. bits: None where the tensor is stored as it is."""

    values: Entry
    bits: Entry | None


class Layout(NamedTuple):
    """header: of the bitmask file. dense: of the file that comes back, its bytes included."""

    header: Header
    dense: Header
    places: dict[str, Place]  # by name, in the dense file's order


def size_of(header: Header) -> int:
    """Bytes of a file with this header."""
    return max((entry.end for entry in header.entries), default=len(header.raw))


def unpacked(header: Header) -> Layout:
    """A dense file, seen as one of which nothing is packed."""
    return Layout(header, header, {entry.name: Place(entry, None) for entry in header.entries})


def is_packed(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata say that it is a bitmask file, of whatever version."""
    return VERSION_KEY in metadata


def pays(entry: Entry, nonzero: int) -> bool:
    """Whether a tensor is smaller as bits and values."""
    count = prod(entry.shape)
    if entry.dtype not in PACKED:
        return False
    return (count + 7) // 8 + nonzero * entry.dtype.itemsize < count * entry.dtype.itemsize


def lay_out(dense: Header, nonzero: Mapping[str, int], where: str) -> Layout:
    """The file for a dense one.

    nonzero: how many weights have any bit set, of each tensor that may be packed. It is, where that
        makes it smaller.
    where: the dense file, for errors.
    """
    for key in (VERSION_KEY, DENSE_KEY):
        if key in dense.metadata:
            raise ValueError(f"{where} must be dense, got metadata of a bitmask file ({key})")
    names = {entry.name for entry in dense.entries}
    stored: list[tuple[Entry, int | None]] = []
    for entry in dense.entries:
        count = nonzero.get(entry.name)
        # Where the name of its bits is taken the tensor is stored as it is.
        packed = count is not None and pays(entry, count) and entry.name + BITS not in names
        stored.append((entry, count if packed else None))
    # From the largest type to the smallest, the bits last: so every tensor lies aligned.
    stored.sort(key=lambda item: -item[0].dtype.itemsize)
    described = [
        (entry.name, entry.dtype, list(entry.shape) if count is None else [count])
        for entry, count in stored
    ]
    described += [
        (entry.name + BITS, torch.uint8, [(prod(entry.shape) + 7) // 8])
        for entry, count in stored
        if count is not None
    ]
    own = {VERSION_KEY: VERSION, DENSE_KEY: dense.raw[8:].decode("utf-8")}
    header = make_header(described, dense.metadata | own, where)
    return _join(header, dense, where)


def read_layout(header: Header, where: str) -> Layout | None:
    """The layout of a bitmask file from its header; None for a dense file.

    Raises ValueError for another version, and for a header that contradicts itself.
    """
    if not is_packed(header.metadata):
        return None
    if (found := header.metadata[VERSION_KEY]) != VERSION:
        raise ValueError(f"{where} must have bitmask format version {VERSION}, got {found[:80]!r}")
    if DENSE_KEY not in header.metadata:
        raise ValueError(f"{where} must hold the header of its dense file, got none")
    text = header.metadata[DENSE_KEY].encode("utf-8", "surrogatepass")
    raw = len(text).to_bytes(8, "little") + text
    return _join(header, parse_header(raw, None, f"{where}: its dense header"), where)


def _join(header: Header, dense: Header, where: str) -> Layout:
    """Match what is stored with what it stands for."""
    stored = {entry.name: entry for entry in header.entries}
    wanted = {entry.name for entry in dense.entries}
    places: dict[str, Place] = {}
    for entry in dense.entries:
        values = stored.pop(entry.name, None)
        # A name of the dense file is that tensor's own, even if it ends as those of bits do.
        bits = None if entry.name + BITS in wanted else stored.pop(entry.name + BITS, None)
        if values is None:
            raise ValueError(f"{where} must hold every tensor, got no {entry.name}")
        _check(entry, values, bits, where)
        places[entry.name] = Place(values, bits)
    if stored:
        name = min(stored)
        raise ValueError(f"{where} must hold nothing but its tensors, got {name[:80]!r}, of none")
    return Layout(header, dense, places)


def _check(entry: Entry, values: Entry, bits: Entry | None, where: str) -> None:
    if values.dtype != entry.dtype:
        raise ValueError(f"{where}: {entry.name} must be {entry.dtype}, got {values.dtype}")
    if bits is None:
        if values.shape != entry.shape:
            raise ValueError(
                f"{where}: {entry.name} must have shape {list(entry.shape)}, "
                f"got {list(values.shape)}, and no bits"
            )
        return
    if entry.dtype not in PACKED:
        raise ValueError(
            f"{where}: {entry.name} must be float32, bfloat16 or float16 to have bits, "
            f"got {entry.dtype}"
        )
    count = prod(entry.shape)
    if bits.dtype != torch.uint8 or bits.shape != ((count + 7) // 8,):
        raise ValueError(
            f"{where}: {bits.name} must be uint8 [{(count + 7) // 8}] for {count} weights, "
            f"got {bits.dtype} {list(bits.shape)}"
        )
    if len(values.shape) != 1 or values.shape[0] > count:
        raise ValueError(
            f"{where}: {entry.name} must hold at most {count} values in one dimension, "
            f"got {list(values.shape)}"
        )


def why(error: RuntimeError) -> str:
    """What `ops.unpack` says, without its place in the source."""
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).split("\n")[0])


def make_header(
    tensors: Iterable[tuple[str, torch.dtype, Collection[int]]],
    metadata: Mapping[str, str],
    where: str,
) -> Header:
    """The header of a safetensors file of these tensors, one after the other."""
    found: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * dtype.itemsize
        found[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST:
        raise ValueError(f"{where} must need a header of at most {MOST} bytes, got {len(text)}")
    raw = len(text).to_bytes(8, "little") + text
    return parse_header(raw, len(raw) + at, where)
