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
from .locate import Index, Weights

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
    index: that of a folder's dense shards; None where there is none.
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
        self.index = found.listing
        if self.index is not None:
            self.index.check({e.name: s.path for s in self.shards for e in s.stored.entries})
            if self.packed:
                self.index = _dense_index(self.index)
                self.index.check({name: shard.path for name, shard in self.home.items()})

    def check_dense(self) -> None:
        """Refuse weights that are stored as bits and values."""
        if self.packed or self.foreign:
            raise ValueError(
                f"{self.path} must be dense, got one stored as bits and values: "
                "`dimap expand` makes it dense"
            )

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
                self._write_index(files, self.index.text)
            yield files

    def write_index(
        self, files: Sequence[Path], headers: Sequence[Header], *, packed: bool = False
    ) -> None:
        """Give a folder of other files the index of these. packed: they are bitmask files."""
        if self.index is None:
            return
        found = json.loads(self.index.text.decode("utf-8"))
        stored = found.get("metadata")
        metadata = dict(stored) if isinstance(stored, dict) else {}
        metadata["total_size"] = sum(entry.nbytes for h in headers for entry in h.entries)
        if packed:
            metadata[DENSE_KEY] = self.index.text.decode("utf-8")
        home = {
            e.name: s.path.name
            for s, h in zip(self.shards, headers, strict=True)
            for e in h.entries
        }
        found |= {"metadata": metadata, "weight_map": dict(sorted(home.items()))}
        self._write_index(files, f"{json.dumps(found, indent=2)}\n".encode())

    def _write_index(self, files: Sequence[Path], text: bytes) -> None:
        assert self.index is not None
        index = files[0].with_name(self.index.path.name)
        index.unlink()  # a copy of this one's, which may be read-only
        index.write_bytes(text)


def _dense_index(index: Index) -> Index:
    """That of the dense shards, which the index of bitmask files keeps word for word."""
    metadata = json.loads(index.text.decode("utf-8")).get("metadata")
    dense = metadata.get(DENSE_KEY) if isinstance(metadata, dict) else None
    if not isinstance(dense, str):
        raise ValueError(f"{index.path} must hold the index of the dense shards, got none")
    return Index.read(index.path, dense.encode("utf-8", "surrogatepass"))
