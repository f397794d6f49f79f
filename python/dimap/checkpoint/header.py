"""Where a safetensors file keeps the bytes of each tensor: headers read, checked and written without torch.

Layout: 8 bytes, the header's length (little endian); the header, JSON of tensor name -> dtype,
shape and data_offsets (relative to the header's end), and "__metadata__"; then the data, without
holes. Whatever differs is refused: a file is hostile until it is checked.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .._errors import Damaged
from ..groups import Slice

if TYPE_CHECKING:
    import torch

MOST = 100_000_000  # bytes of a header: the format's own limit
LARGEST = 1 << 62  # weights in a tensor: beyond it, sizes are no longer meant


class DType(NamedTuple):
    """A type of elements.

    code: of safetensors, "" where it has none. name: torch's. bits: of one element. mask: the bits
    that make an element nonzero if any of them is set; 0 where every value is taken for nonzero.
    most: these bits of the largest value that is no NaN; 0 where there is none to be told.
    """

    code: str
    name: str
    bits: int
    mask: int
    most: int = 0

    @property
    def size(self) -> int:
        """Bytes of one element; 0 where several share a byte."""
        return self.bits // 8

    @property
    def is_floating_point(self) -> bool:
        return self.name.startswith(("float", "bfloat"))

    def torch(self) -> torch.dtype:
        """torch's type. Raises ValueError where it has none."""
        import torch

        found = getattr(torch, self.name, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"the type {self.code} needs a newer torch than {torch.__version__}")
        return found

    def __str__(self) -> str:
        return f"torch.{self.name}"


def _all(bits: int) -> int:
    return (1 << bits) - 1


_F32_NUMBER = _all(31)  # without its sign
DTYPES = {
    dtype.code: dtype
    for dtype in (
        DType("F64", "float64", 64, _all(63), 0x7FF << 52),
        DType("F32", "float32", 32, _F32_NUMBER, 0xFF << 23),
        DType("F16", "float16", 16, _all(15), 0x1F << 10),
        DType("BF16", "bfloat16", 16, _all(15), 0xFF << 7),
        DType("F8_E4M3", "float8_e4m3fn", 8, _all(7), 0x7E),
        DType("F8_E5M2", "float8_e5m2", 8, _all(7), 0x7C),
        DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, _all(8)),  # no negative zero: that is NaN
        DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, _all(8)),
        DType("F8_E8M0", "float8_e8m0fnu", 8, 0),  # powers of two
        DType("F6_E2M3", "float6_e2m3", 6, 0),
        DType("F6_E3M2", "float6_e3m2", 6, 0),
        DType("F4", "float4_e2m1fn_x2", 4, 0),
        DType("I64", "int64", 64, _all(64)),
        DType("I32", "int32", 32, _all(32)),
        DType("I16", "int16", 16, _all(16)),
        DType("I8", "int8", 8, _all(8)),
        DType("U64", "uint64", 64, _all(64)),
        DType("U32", "uint32", 32, _all(32)),
        DType("U16", "uint16", 16, _all(16)),
        DType("U8", "uint8", 8, _all(8)),
        DType("BOOL", "bool", 8, _all(8)),
        DType("C64", "complex64", 64, _F32_NUMBER << 32 | _F32_NUMBER),
    )
}
_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


def dtype_of(given: torch.dtype) -> DType:
    """The same type by torch; without a code where safetensors do not have it."""
    name = str(given).removeprefix("torch.")
    return _BY_NAME.get(name) or DType("", name, 8 * given.itemsize, 0)


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor."""

    dtype: DType
    shape: tuple[int, ...]

    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.bits // 8

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of torch's tensor, which counts F4 in pairs."""
        if self.dtype.code == "F4" and self.shape:
            return (*self.shape[:-1], self.shape[-1] // 2)
        return self.shape

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        """That of a tensor in memory."""
        dtype, shape = dtype_of(tensor.dtype), tuple(tensor.shape)
        if dtype.code == "F4" and shape:
            shape = (*shape[:-1], 2 * shape[-1])
        return cls(dtype, shape)

    def part_spec(self, name: str) -> Spec:
        """Of the tensor by its name in a layer: of a slice along its first axis, or of all of it."""
        return Spec(self.dtype, self.shape[1:]) if isinstance(name, Slice) else self

    def meta(self) -> torch.Tensor:
        """A tensor on the meta device that stands for it. Imports torch."""
        import torch

        return torch.empty(self.torch_shape, dtype=self.dtype.torch(), device="meta")


@dataclass(frozen=True)
class Entry(Spec):
    """One tensor of a file: its bytes [begin, end)."""

    name: str
    begin: int
    end: int

    def part(self, name: str) -> Entry:
        """The tensor by its name in a layer: a slice along its first axis, or all of it."""
        if not isinstance(name, Slice):
            return self
        size = prod(self.shape[1:]) * self.dtype.bits // 8
        begin = self.begin + name.at * size
        return Entry(self.dtype, self.shape[1:], name, begin, begin + size)


class Header(NamedTuple):
    """raw: the file's bytes before its data. entries: in the order of their bytes."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: dict[str, str]

    @property
    def file_size(self) -> int:
        """Bytes of a file with this header."""
        return max((entry.end for entry in self.entries), default=len(self.raw))


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
        whole = len(head) == 8 and 2 <= length <= min(MOST, size - 8)
        raw = head + file.read(length if whole else 0)
    try:
        if size < 10:
            raise ValueError(f"it has {size} bytes")
        if not whole and 2 <= length <= MOST:
            raise ValueError(f"it ends within its header, having {size} bytes")
        if not whole:
            raise ValueError("it does not begin with the length of a header")
        return parse_header(raw, size, str(path))
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        raise Damaged(
            f"{path} must be a complete safetensors file, got one that is truncated, damaged or of "
            f"another format ({reason})"
        ) from error


def parse_header(raw: bytes, size: int | None, where: str) -> Header:
    """`read_header` on bytes: raw is the file up to its data.

    size: the length of the file; None where there is no file yet, only its header.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        refuse(where, "have a complete header", f"{len(raw)} bytes of it")
    try:
        found = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=unique)
        if isinstance(found, dict):
            "".join(found).encode()  # no halves of surrogate pairs
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must have a header of JSON, got {_short(error)}") from error
    if not isinstance(found, dict):
        refuse(where, "have an object for its header", type(found).__name__)
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse(where, "have strings for its metadata", metadata)
    entries = [_entry(name, entry, len(raw), where) for name, entry in found.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = len(raw)
    for entry in entries:
        if entry.begin != end:
            required = f"begin where the tensor before it ends, at byte {end}"
            refuse(f"{where}: {entry.name}", required, entry.begin)
        end = entry.end
    if size is not None and end != size:
        refuse(where, f"be {end} bytes long as its header says", size)
    return Header(raw, tuple(entries), metadata)


def refuse(what: str, required: str, got: object) -> NoReturn:
    """Raise ValueError: what it is that must be otherwise, how, and how it is."""
    raise ValueError(f"{what} must {required}, got {_short(got)}")


def make_header(
    tensors: Iterable[tuple[str, DType, Sequence[int]]],
    metadata: Mapping[str, str],
    where: str,
    length: int = 0,
) -> Header:
    """The header of a safetensors file of these tensors, one after the other.

    length: the bytes before the data, at least.
    """
    found: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * dtype.bits // 8
        found[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, length - 8 - len(text))
    if len(text) > MOST:
        refuse(where, f"need a header of at most {MOST} bytes", len(text))
    raw = len(text).to_bytes(8, "little") + text
    return parse_header(raw, len(raw) + at, where)


def with_metadata(header: Header, more: Mapping[str, str], where: str) -> Header:
    """The header of the same tensors and of more metadata, which goes behind what is there."""
    described = ((entry.name, entry.dtype, entry.shape) for entry in header.entries)
    return make_header(described, {**header.metadata, **more}, where) if more else header


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json`: an object as a dict; ValueError where a name is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} twice")
        found[name] = value
    return found


def _entry(name: str, entry: Any, start: int, where: str) -> Entry:
    what = f"{where}: {_short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(what, "have dtype, shape and data_offsets", entry)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        refuse(what, "have a dtype of safetensors", entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    # Zeros left out: what they are multiplied with is no excuse for an absurd size.
    if not _sizes(shape) or len(shape) > 64 or prod(n or 1 for n in shape) > LARGEST:
        refuse(what, "have sizes for a shape", shape)
    want, odd = divmod(prod(shape) * dtype.bits, 8)
    if odd or not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != want:
        required = f"have offsets {want} bytes apart for {entry['dtype']} {_short(shape)}"
        refuse(what, required, offsets)
    return Entry(dtype, tuple(shape), name, start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= LARGEST for n in value)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return ascii(text)[1:-1] if len(text) <= 80 else ascii(text[:77])[1:-1] + "..."
