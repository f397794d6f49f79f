"""Checkpoints of one or more safetensors files, dense or bitmask files."""

from __future__ import annotations

import errno
import json
import mmap
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import naming
from .base import Checkpoint, raw_bytes
from .bitmask import DENSE_KEY, check_bits, read_layout
from .compact import Table, decoded, read_table
from .header import Entry, Header, read_header
from .locate import Weights, check_index, read_index

if TYPE_CHECKING:
    import os

    from torch import Tensor

COMPRESSED, PARTS = ".compressed", (".bitmask", ".row_offsets", ".shape")  # see `sparse_bitmask`


class Shard:
    """One file.

    stored: the file's own header.
    layout: which of its tensors stand for which of the dense file's; of a dense file, itself.
    header: of the dense file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self.stored = read_header(path)
        self.layout = read_layout(self.stored, str(path))
        self.header = self.layout.dense
        self.entries = {entry.name: entry for entry in self.header.entries}

    def get(self, name: str) -> Tensor:
        place, entry = self.layout.places[name], self.entries[name]
        if self.layout.form == "compact":
            return self.load([name])[name]
        values = self._tensor(place.values)
        if place.bits is None:
            return values
        from .. import ops

        bits = self._tensor(place.bits)
        check_bits(raw_bytes(bits), entry.numel(), values.numel(), f"{self.path}: {name}")
        return ops.unpack(bits, values, entry.shape)

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """Tensors by their names; those of a compact file are all read at the same time."""
        if self.layout.form != "compact":
            return {name: self.get(name) for name in names}
        import torch

        table, found, memory = self.table(names), {}, {}
        for name in names:
            entry = self.entries[name]
            found[name] = torch.empty(entry.torch_shape, dtype=entry.dtype.torch())
            memory[name] = raw_bytes(found[name])

        def fill(entry: Entry, first: int, data: memoryview) -> None:
            begin = first * (entry.dtype.size or 1)
            memory[entry.name][begin : begin + len(data)] = data

        deque(decoded(self.path, table, fill), maxlen=0)
        return found

    def table(self, names: Iterable[str]) -> Table:
        """Of a compact file, the blocks of tensors."""
        places = self.layout.places
        return read_table(self.path, ((self.entries[n], places[n].values) for n in names))

    def _tensor(self, entry: Entry) -> Tensor:
        import torch

        dtype = entry.dtype.torch()
        if entry.nbytes == 0:
            return torch.empty(entry.torch_shape, dtype=dtype)
        flat = torch.frombuffer(
            self._mapping, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin
        )
        if entry.begin % dtype.itemsize:
            flat = flat.clone()  # torch wants its elements aligned
        return flat.view(dtype).view(entry.torch_shape)

    @cached_property
    def _mapping(self) -> mmap.mmap:
        """The file in memory, page by page as it is read; what is written into it is private."""
        with open(self.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(mapping) != self.stored.file_size:
            raise OSError(errno.EIO, "must not change while it is read", str(self.path))
        return mapping


class Shards(Checkpoint):
    """Tensors of one or more files, in the order of the files and of the tensors in them.

    packed: whether any of the files is a bitmask file.
    foreign: of tensors that another library stored as bits and values, what their parts' names begin with.
    index: the text of a folder's index, that of the dense shards; None where there is none.
    """

    endings = (".safetensors",)

    def __init__(self, path: str, form: str, found: Weights) -> None:
        self.shards = [Shard(file) for file in found.files]
        self.home: dict[str, Shard] = {}
        metadata: dict[str, str] = {}
        for shard in self.shards:
            metadata |= shard.header.metadata
            for name in shard.entries:
                if name in self.home:
                    raise ValueError(
                        f"{path}: a tensor must be in one shard, got {name} in "
                        f"{self.home[name].path.name} and in {shard.path.name}"
                    )
                self.home[name] = shard
        # In the order of their bytes: so they are written, one after the other.
        tensors = {n: e for s in self.shards for n, e in s.entries.items()}
        super().__init__(path, form, found.files, tensors, metadata)
        self.packed = any(shard.layout.form != "dense" for shard in self.shards)
        stems = [name.removesuffix(COMPRESSED) for name in tensors if name.endswith(COMPRESSED)]
        self.foreign = [stem for stem in stems if all(stem + part in tensors for part in PARTS)]
        if self.packed or self.foreign:
            self.notes = ["stored as bits and nonzero values: `dimap expand` gives the dense one"]
        self.index: bytes | None = None
        if found.listing is not None:
            self.index_name, self.index = found.listing.name, found.text
            stored = {e.name: s.path for s in self.shards for e in s.stored.entries}
            check_index(found.listing, found.weight_map, stored)
            if self.packed:
                self.index = _dense_index(found.text, found.listing)
                dense = read_index(self.index, found.listing)
                check_index(found.listing, dense, {n: s.path for n, s in self.home.items()})

    def get(self, name: str) -> Tensor:
        return self.home[name].get(name)

    def rewrite(
        self, targets: Sequence[Path], state: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        for shard, target in zip(self.shards, targets, strict=True):
            with open(target, "wb") as file:
                file.write(shard.header.raw)
                for entry in shard.header.entries:
                    file.write(raw_bytes(state[entry.name]))

    @contextmanager
    def creating(self, out: str | os.PathLike[str], *, force: bool = False) -> Iterator[list[Path]]:
        with super().creating(out, force=force) as files:
            if self.packed and self.index is not None:
                self.write_index(files, self.index)
            yield files

    def write_index(self, files: Sequence[Path], text: bytes) -> None:
        """Give an output another index than the copy of this one, which may be read-only."""
        index = files[0].with_name(self.index_name)
        index.unlink()
        index.write_bytes(text)


def _dense_index(text: bytes, path: Path) -> bytes:
    """The index of the dense shards, which that of bitmask files keeps word for word."""
    metadata = json.loads(text.decode("utf-8")).get("metadata")
    dense = metadata.get(DENSE_KEY) if isinstance(metadata, dict) else None
    if not isinstance(dense, str):
        raise ValueError(f"{path} must hold the index of the dense shards, got none")
    return dense.encode("utf-8", "surrogatepass")


def packed_index(dense: bytes, headers: Mapping[str, Header]) -> bytes:
    """The index of a folder of bitmask files. dense: that of the dense shards. headers: by file."""
    return make_index(dense, headers, {DENSE_KEY: dense.decode("utf-8")})


def make_index(text: bytes, headers: Mapping[str, Header], more: Mapping[str, str]) -> bytes:
    """An index like the one of this text, of these files, with more metadata."""
    index = json.loads(text.decode("utf-8"))
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    entries = {entry.name: (file, entry) for file, h in headers.items() for entry in h.entries}
    metadata |= {"total_size": sum(entry.nbytes for _, entry in entries.values()), **more}
    weight_map = {name: entries[name][0] for name in sorted(entries)}
    index |= {"metadata": metadata, "weight_map": weight_map}
    return f"{json.dumps(index, indent=2)}\n".encode()
