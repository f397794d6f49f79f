"""Where a safetensors file keeps the bytes of each tensor, found without reading its data.

Layout: 8 bytes, the header's length (little endian); the header, JSON of tensor name -> dtype,
shape and data_offsets (relative to the header's end), and "__metadata__"; then the data, without
holes. Whatever differs is refused: a file is hostile until it is checked.
"""

from __future__ import annotations

import errno
import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

MOST = 100_000_000  # bytes of a header: the format's own limit
LARGEST = 1 << 62  # weights in a tensor: beyond it, sizes are no longer meant
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def element(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an element, and the bits of which any is set where it is not zero; 0: it never is zero."""
    size = dtype.itemsize
    if dtype == torch.float8_e8m0fnu:  # powers of two
        return size, 0
    if dtype == torch.complex64:
        return size, 0x7FFFFFFF_7FFFFFFF
    signed_zero = dtype.is_floating_point and "fnuz" not in str(dtype)
    return size, (1 << (8 * size - signed_zero)) - 1


class Entry(NamedTuple):
    """One tensor: bytes [begin, end) of its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """raw: the file's bytes before its data. entries: in the order of their bytes."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a file.

    Raises OSError where it cannot be read; ValueError where it is no safetensors file, or a
    truncated, damaged or hostile one.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "must be a safetensors file, got a folder", str(path))
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(MOST, size - 8):
            raise ValueError(
                f"{path} must be a safetensors file with a header of at most "
                f"{max(0, min(MOST, size - 8))} bytes, got {length if len(head) == 8 else 'none'}"
            )
        raw = head + file.read(length)
    return parse_header(raw, size, str(path))


def parse_header(raw: bytes, size: int | None, where: str) -> Header:
    """`read_header` on bytes: raw is the file up to its data.

    size: the length of the file; None where there is no file yet, only its header.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise ValueError(f"{where} must have a complete header, got {len(raw)} bytes of it")
    try:
        found = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must have a header of JSON, got {_short(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must have an object for its header, got {_kind(found)}")
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{where} must have strings for its metadata, got {_short(metadata)}")
    entries = [_entry(name, entry, len(raw), where) for name, entry in found.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = len(raw)
    for entry in entries:
        if entry.begin != end:
            raise ValueError(
                f"{where}: {entry.name} must begin where the tensor before it ends, at byte {end}, "
                f"got {entry.begin}"
            )
        end = entry.end
    if size is not None and end != size:
        raise ValueError(f"{where} must be {end} bytes long as its header says, got {size}")
    return Header(raw, tuple(entries), metadata)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json`: an object as a dict; ValueError where a name is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} twice")
        found[name] = value
    return found


def _entry(name: str, entry: Any, start: int, where: str) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where}: {_short(name)} must have dtype, shape and data_offsets, got {_short(entry)}"
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"{where}: {_short(name)} must have a dtype that torch knows, "
            f"got {_short(entry['dtype'])}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    # Zeros left out: what they are multiplied with is no excuse for an absurd size.
    if not _sizes(shape) or len(shape) > 64 or prod(n or 1 for n in shape) > LARGEST:
        raise ValueError(
            f"{where}: {_short(name)} must have sizes for a shape, got {_short(shape)}"
        )
    want = prod(shape) * dtype.itemsize
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != want:
        raise ValueError(
            f"{where}: {_short(name)} must have offsets {want} bytes apart for {entry['dtype']} "
            f"{_short(shape)}, got {_short(offsets)}"
        )
    return Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= LARGEST for n in value)


def _kind(value: Any) -> str:
    return type(value).__name__


def _short(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return ascii(text)[1:-1] if len(text) <= 80 else ascii(text[:77])[1:-1] + "..."
