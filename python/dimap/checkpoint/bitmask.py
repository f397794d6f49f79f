"""The bitmask formats: where a bitmask file keeps what, and files of it made from tensors in memory.

The format is written down in docs/format.md. What a file says of itself is checked in full before
any of it is used; what does not fit, or is of another version, is refused.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from .._files import replacing
from ..groups.plan import check_choice
from .base import raw_bytes
from .compact import STEP, Writer, in_parallel
from .header import DTYPES, Entry, Header, Spec, dtype_of, make_header, parse_header, refuse

if TYPE_CHECKING:
    import os

    from torch import Tensor

Format = Literal["dense", "bitmask", "compact"]
VERSIONS: dict[str, Literal["bitmask", "compact"]] = {"1": "bitmask", "2": "compact"}
VERSION_KEY = "dimap_bitmask"  # metadata of a bitmask file
DENSE_KEY = "dimap_dense"  # metadata: the dense file's header; of an index: the dense one's text
DIGEST_KEY = "dimap_sha256"  # metadata of a compact file: of that text
BITS = ".bitmask"  # ends the name of a tensor's bits
PACKED = ("F32", "BF16", "F16")


class Place(NamedTuple):
    """What the file keeps of a tensor. bits: None where the tensor is stored as it is."""

    values: Entry
    bits: Entry | None


class Layout(NamedTuple):
    """header: of the bitmask file. dense: of the file that comes back, its bytes included.

    form: what the file is; of a compact one the values are the blocks.
    """

    header: Header
    dense: Header
    places: dict[str, Place]  # by name, in the dense file's order
    form: Format


def pays(entry: Entry, nonzero: int) -> bool:
    """Whether a tensor is smaller as bits and values."""
    if entry.dtype.code not in PACKED:
        return False
    return (entry.numel() + 7) // 8 + nonzero * entry.dtype.size < entry.nbytes


def lay_out(dense: Header, nonzero: Mapping[str, int], where: str) -> Layout:
    """The file for a dense one.

    nonzero: how many weights have any bit set, of each tensor that may be packed. It is, where that
        makes it smaller.
    where: the dense file, for errors.
    """
    counts = _packable(dense, nonzero)
    packed = {e.name for e in dense.entries if e.name in counts and pays(e, counts[e.name])}
    header = _header(dense, {name: counts[name] for name in packed}, where)
    return _join(header, dense, "bitmask", where)


def size_at_most(dense: Header, nonzero: Mapping[str, int], where: str) -> int:
    """Bytes that the file of `lay_out` does not exceed, and hardly falls below; it grows with the counts.

    The header is that of a file that packs all of them, if packing pays or not.
    """
    counts = _packable(dense, nonzero)
    saved = 0
    for entry in dense.entries:
        if entry.name in counts:
            size = counts[entry.name] * entry.dtype.size + (entry.numel() + 7) // 8
            saved += max(0, size - entry.nbytes)
    return _header(dense, counts, where).file_size - saved


def _packable(dense: Header, nonzero: Mapping[str, int]) -> dict[str, int]:
    """The counts but for tensors of whose bits the name is taken: they are stored as they are."""
    names = {entry.name for entry in dense.entries}
    return {name: count for name, count in nonzero.items() if name + BITS not in names}


def _header(dense: Header, counts: Mapping[str, int], where: str) -> Header:
    """That of a bitmask file. counts: of the values of each tensor that is packed."""
    # From the largest type to the smallest, the bits last: so every tensor lies aligned.
    entries = sorted(dense.entries, key=lambda entry: -entry.dtype.bits)
    stored = [(e.name, e.dtype, [counts[e.name]] if e.name in counts else e.shape) for e in entries]
    packed = [entry for entry in entries if entry.name in counts]
    bits = [(e.name + BITS, DTYPES["U8"], [(e.numel() + 7) // 8]) for e in packed]
    return make_header([*stored, *bits], _metadata(dense, "bitmask", where), where)


def compact_file(file: Path, dense: Header, where: str) -> Writer:
    """What makes the empty file a compact one. where: the dense file, for errors."""
    return Writer(file, dense, _metadata(dense, "compact", where), where)


def _metadata(dense: Header, form: Format, where: str) -> dict[str, str]:
    """Those of the file for a dense one."""
    for key in (VERSION_KEY, DENSE_KEY, DIGEST_KEY):
        if key in dense.metadata:
            refuse(where, "be dense", f"metadata of a bitmask file ({key})")
    version = next(v for v, named in VERSIONS.items() if named == form)
    own = {VERSION_KEY: version, DENSE_KEY: dense.raw[8:].decode("utf-8")}
    if form == "compact":
        own[DIGEST_KEY] = hashlib.sha256(dense.raw[8:]).hexdigest()
    return dense.metadata | own


def read_layout(header: Header, where: str) -> Layout:
    """The layout of a file from its header; of a dense one every tensor is stored as it is.

    Raises ValueError for another version, and for a header that contradicts itself.
    """
    if VERSION_KEY not in header.metadata:
        places = {entry.name: Place(entry, None) for entry in header.entries}
        return Layout(header, header, places, "dense")
    form = VERSIONS.get(found := header.metadata[VERSION_KEY])
    if form is None:
        refuse(where, f"have bitmask format version {' or '.join(VERSIONS)}", repr(found))
    if DENSE_KEY not in header.metadata:
        refuse(where, "hold the header of its dense file", "none")
    text = header.metadata[DENSE_KEY].encode("utf-8", "surrogatepass")
    raw = len(text).to_bytes(8, "little") + text
    dense = parse_header(raw, None, f"{where}: its dense header")
    if form == "compact" and header.metadata != _metadata(dense, form, where):
        refuse(where, "hold its dense header undamaged, and its metadata", "others")
    return _join(header, dense, form, where)


def _join(header: Header, dense: Header, form: Format, where: str) -> Layout:
    """Match what is stored with what it stands for."""
    stored = {entry.name: entry for entry in header.entries}
    wanted = {entry.name for entry in dense.entries}
    places: dict[str, Place] = {}
    for entry in dense.entries:
        values = stored.pop(entry.name, None)
        # A name of the dense file is that tensor's own, even if it ends as those of bits do.
        bits = None
        if form == "bitmask" and entry.name + BITS not in wanted:
            bits = stored.pop(entry.name + BITS, None)
        if values is None:
            refuse(where, "hold every tensor", f"no {entry.name}")
        if form == "compact":
            _check_blocks(values, where)
        else:
            _check(entry, values, bits, where)
        places[entry.name] = Place(values, bits)
    if stored:
        refuse(where, "hold nothing but its tensors", f"{min(stored)!r}, of none")
    return Layout(header, dense, places, form)


def _check_blocks(values: Entry, where: str) -> None:
    if values.dtype.code != "U8" or len(values.shape) != 1:
        got = f"{values.dtype} {list(values.shape)}"
        refuse(f"{where}: {values.name}", "be blocks, uint8 in one dimension", got)


def _check(entry: Entry, values: Entry, bits: Entry | None, where: str) -> None:
    what, count = f"{where}: {entry.name}", entry.numel()
    if values.dtype != entry.dtype:
        refuse(what, f"be {entry.dtype}", values.dtype)
    if bits is None:
        if values.shape != entry.shape:
            refuse(what, f"have shape {list(entry.shape)}", f"{list(values.shape)}, and no bits")
        return
    if entry.dtype.code not in PACKED:
        refuse(what, "be float32, bfloat16 or float16 to have bits", entry.dtype)
    size = (count + 7) // 8
    if bits.dtype.code != "U8" or bits.shape != (size,):
        got = f"{bits.dtype} {list(bits.shape)}"
        refuse(f"{where}: {bits.name}", f"be uint8 [{size}] for {count} weights", got)
    if len(values.shape) != 1 or values.shape[0] > count:
        refuse(what, f"hold at most {count} values in one dimension", list(values.shape))


def check_bits(bits: memoryview, weights: int, values: int, where: str) -> None:
    """Bits must say as many values as there are, and none beyond the weights."""
    if weights % 8 and bits[-1] >> weights % 8:
        refuse(where, "have zeros in the unused bits", "ones")
    ones = int.from_bytes(bits, "little").bit_count()
    if ones != values:
        refuse(where, f"have as many values as its bits say, {ones}", values)


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    format: Literal["bitmask", "compact"] = "bitmask",
) -> None:
    """Write a bitmask file; a file that is there already is replaced.

    tensors: name -> tensor of any device and of a dtype that safetensors have. Those of float32,
        bfloat16 and float16 are packed where that makes them smaller, the others stored as they are.
    metadata: strings to store beside them.
    format: "bitmask", or "compact" for all of them in compressed blocks: smaller, and slower.

    Raises TypeError for what is no tensor, or not of strings; ValueError for tensors that cannot be
    stored; OSError where the file cannot be written. The file appears complete or not at all.
    """
    check_choice("format", format, list(VERSIONS.values()))
    _check_state(tensors, metadata or {})
    with replacing(Path(path), force=True) as temporary:
        write_packed(temporary, tensors, metadata or {}, tensors, format, str(path))


def write_packed(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    pack: Collection[str],
    form: Format,
    where: str,
) -> None:
    """Fill the empty file with tensors, those in `pack` packed where that makes them smaller.

    Of a compact file all are.
    """
    from .. import ops

    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    specs = [(name, Spec.of(tensors[name])) for name in order]
    dense = make_header(((n, spec.dtype, spec.shape) for n, spec in specs), metadata, where)
    if form == "compact":
        with compact_file(file, dense, where) as writer:

            def pieces() -> Iterator[tuple[int, memoryview]]:
                for entry in dense.entries:
                    data = raw_bytes(tensors[entry.name])
                    for at in range(0, entry.nbytes, STEP):
                        yield entry.begin + at, data[at : at + STEP]

            deque(in_parallel(lambda piece: writer.put(*piece), pieces()), maxlen=0)
            writer.finish()
        return
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    for entry in dense.entries:
        if entry.name in pack and entry.dtype.code in PACKED:
            bits, values = ops.pack(tensors[entry.name].detach().cpu())
            if pays(entry, values.numel()):  # else let go of it at once
                packed[entry.name] = bits, values
    layout = lay_out(dense, {name: values.numel() for name, (_, values) in packed.items()}, where)
    parts: dict[str, Tensor] = {}
    for name, place in layout.places.items():
        parts[name] = tensors[name]
        if place.bits:
            parts[place.bits.name], parts[name] = packed[name]
    with open(file, "wb") as out:
        out.write(layout.header.raw)
        for entry in layout.header.entries:
            out.write(raw_bytes(parts[entry.name]))


def _check_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    import torch

    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"tensors must map names to tensors, got {name!r}: {type(tensor).__name__}"
            )
        if name == "__metadata__":
            raise ValueError(f"tensors must not be called {name!r}: the file format uses it")
        check_storable(name, tensor)


def check_storable(name: str, tensor: Tensor) -> None:
    """A tensor must be one that safetensors can hold. Raises ValueError."""
    import torch

    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = str(tensor.layout).removeprefix("torch.")
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else kind
        refuse(name, "be a dense tensor with weights for safetensors", f"a {kind} one")
    if dtype_of(tensor.dtype).code not in DTYPES:
        refuse(name, "have a dtype of safetensors", tensor.dtype)
