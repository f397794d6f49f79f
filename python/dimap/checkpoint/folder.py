"""Checkpoints of one or more safetensors files, dense or bitmask files."""

from __future__ import annotations

import errno
import json
import mmap
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import naming
from .base import INDEX, SINGLE, Checkpoint, Writer, raw_bytes, shorten
from .bitmask import DENSE_KEY, check_bits, is_packed, read_layout
from .header import Entry, Header, read_header, unique

if TYPE_CHECKING:
    from torch import Tensor

# Weights in a folder that are not the ones that are pruned.
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack")


class Shard:
    """One file.

    stored: the file's own header.
    layout: which of its tensors stand for which of the dense file's; of a dense file, itself.
    header: of the dense file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self.stored = _read_header(path)
        self.packed = is_packed(self.stored.metadata)
        self.layout = read_layout(self.stored, str(path))
        self.header = self.layout.dense
        self.entries = {entry.name: entry for entry in self.header.entries}

    def get(self, name: str) -> Tensor:
        place, entry = self.layout.places[name], self.entries[name]
        values = self._tensor(place.values)
        if place.bits is None:
            return values
        from .. import ops

        bits = self._tensor(place.bits)
        check_bits(raw_bytes(bits), entry.numel(), values.numel(), f"{self.path}: {name}")
        return ops.unpack(bits, values, entry.shape)

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


def _read_header(path: Path) -> Header:
    try:
        return read_header(path)
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        raise ValueError(
            f"{path} must be a complete safetensors file, got one that is truncated, damaged or of "
            f"another format ({reason})"
        ) from error


class Shards(Checkpoint):
    """Tensors of one or more files, in the order of the files and of the tensors in them.

    packed: whether any of the files is a bitmask file.
    index: the text of a folder's index, that of the dense shards; None where there is none.
    """

    def __init__(self, path: Path, form: str, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.home: dict[str, Shard] = {}
        self.index: bytes | None = None
        metadata: dict[str, str] = {}
        for shard in shards:
            metadata |= shard.header.metadata
            for name in shard.entries:
                if name in self.home:
                    raise ValueError(
                        f"{path}: a tensor must be in one shard, got {name} in "
                        f"{self.home[name].path.name} and in {shard.path.name}"
                    )
                self.home[name] = shard
        # In the order of their bytes: so they are written, one after the other.
        super().__init__(path, form, {n: e for s in shards for n, e in s.entries.items()}, metadata)
        self.packed = any(shard.packed for shard in shards)
        if self.packed:
            self.notes = ["stored as bits and nonzero values: `dimap expand` gives the dense one"]

    def get(self, name: str) -> Tensor:
        return self.home[name].get(name)

    def _writer(self, files: list[Path], ending: str) -> Writer:
        targets = dict(zip((shard.path for shard in self.shards), files, strict=True))
        for shard in self.shards:
            targets[shard.path].write_bytes(shard.header.raw)

        def write(name: str, tensor: Tensor) -> None:
            shard = self.home[name]
            with open(targets[shard.path], "r+b") as file:
                file.seek(shard.entries[name].begin)
                file.write(raw_bytes(tensor))

        return Writer(self.tensors, write)


def open_file(path: Path) -> Shards:
    """A checkpoint of one file."""
    checkpoint = Shards(path, "safetensors", [Shard(path)])
    checkpoint.endings = (".safetensors",)
    return checkpoint


class Folder(Shards):
    """A Hugging Face folder: one file, or shards with their index. Its other files are copied."""

    def __init__(self, path: Path) -> None:
        index = path / INDEX
        weight_map: dict[str, str] = {}
        if (path / SINGLE).exists():  # transformers prefers it to an index, too
            names = [SINGLE]
        elif index.exists():
            text = index.read_bytes()
            weight_map = _weight_map(text, index)
            names = sorted(set(weight_map.values()))
        else:
            held = shorten(sorted(child.name for child in path.iterdir())) or "an empty folder"
            raise FileNotFoundError(
                errno.ENOENT, f"must hold {SINGLE} or {INDEX}, got {held}", str(path)
            )
        for name in names:
            if not (path / name).exists():
                raise FileNotFoundError(
                    errno.ENOENT, f"must be there, since {index} names it", str(path / name)
                )
        super().__init__(path, "folder", [Shard(path / name) for name in names])
        if weight_map:
            stored = {entry.name: s for s in self.shards for entry in s.stored.entries}
            _check_index(index, weight_map, stored)
            self.index = text
            if self.packed:
                self.index = _dense_index(text, index)
                _check_index(index, _weight_map(self.index, index), self.home)
        others = {other for pattern in OTHER_WEIGHTS for other in path.glob(pattern)}
        self.notes += [
            f"{other.name} is kept as it is: its weights are not pruned"
            for other in sorted(others)
            if other.name not in names
        ]

    def _files(self, temporary: Path) -> list[Path]:
        files = [temporary / shard.path.name for shard in self.shards]
        for child in Path(self.path).iterdir():
            if self.packed and self.index is not None and child.name == INDEX:
                (temporary / INDEX).write_bytes(self.index)
            elif temporary / child.name not in files:
                _copy(child, temporary / child.name)
        for file in files:
            file.touch(exist_ok=False)
        return files


def _check_index(index: Path, weight_map: Mapping[str, str], home: Mapping[str, Shard]) -> None:
    for name, file in weight_map.items():
        if name not in home or home[name].path.name != file:
            raise ValueError(f"{index} must match its shards, got {name}, not in {file}")
    for name, shard in home.items():
        if name not in weight_map:
            raise ValueError(
                f"{index} must name every tensor of its shards, got no {name}, "
                f"which is in {shard.path.name}"
            )


def _copy(source: Path, target: Path) -> None:
    """A file or folder; symbolic links are followed, so that the copy stands alone."""
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    try:
        shutil.copytree(source, target)
    except shutil.Error as error:  # a list of (source, target, reason)
        file, _, reason = error.args[0][0]
        raise OSError(errno.EIO, f"could not be copied ({reason})", str(file)) from error


def _weight_map(text: bytes, path: Path) -> dict[str, str]:
    """An index's weight_map: tensor name -> name of a file beside it."""
    try:
        index = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON ({error})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} must have a weight_map from tensor names to file names")
    for file in weight_map.values():
        # Nothing but a plain name: the output must not be written outside its folder.
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(f"{path} must name safetensors files beside it, got {file!r}")
    return weight_map


def _dense_index(text: bytes, path: Path) -> bytes:
    """The index of the dense shards, which that of bitmask files keeps word for word."""
    metadata = json.loads(text.decode("utf-8")).get("metadata")
    dense = metadata.get(DENSE_KEY) if isinstance(metadata, dict) else None
    if not isinstance(dense, str):
        raise ValueError(f"{path} must hold the index of the dense shards, got none")
    return dense.encode("utf-8", "surrogatepass")


def packed_index(dense: bytes, headers: Mapping[str, Header]) -> str:
    """The index of a folder of bitmask files. dense: that of the dense shards. headers: by file."""
    text = dense.decode("utf-8")
    index = json.loads(text)
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    entries = {entry.name: (file, entry) for file, h in headers.items() for entry in h.entries}
    metadata |= {"total_size": sum(entry.nbytes for _, entry in entries.values()), DENSE_KEY: text}
    weight_map = {name: entries[name][0] for name in sorted(entries)}
    return json.dumps(index | {"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
