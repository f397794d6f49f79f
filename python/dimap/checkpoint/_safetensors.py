"""Checkpoints of one or more safetensors files."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import ops
from .._files import naming, open_safetensors
from ._bitmask_layout import DENSE_KEY, read_layout, why
from ._header import read_header, unique
from ._types import INDEX, SINGLE, Checkpoint, Writer, shorten

# Weights in a folder that are not the ones that are pruned.
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack")


class _Shard:
    """One file: validated by the library, its header kept for a copy of it byte by byte.

    header: of the dense file, which a bitmask file stands for.
    layout: of a bitmask file; None where the file itself is the dense one.
    stored: the names of what the file holds: tensors, and bits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = open_safetensors(path)
        with naming(path):
            self.header = read_header(path)
        self.stored = [entry.name for entry in self.header.entries]
        self.layout = read_layout(self.header, str(path))
        if self.layout is not None:
            self.header = self.layout.dense
        # In the order of their bytes: so they are written, one after the other.
        self.tensors = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for entry in self.header.entries
        }

    def get(self, name: str) -> Tensor:
        values: Tensor = self.handle.get_tensor(name)
        place = self.layout and self.layout.places[name]
        if place is None or place.bits is None:
            return values
        bits = self.handle.get_tensor(place.bits.name)
        try:
            return ops.unpack(bits, values, self.tensors[name].shape)
        except RuntimeError as error:
            raise ValueError(f"{self.path}: {name} must match its bits ({why(error)})") from error


class Shards(Checkpoint):
    """Tensors of one or more files, in the order of the files and of the tensors in them."""

    def __init__(self, path: Path, form: str, shards: list[_Shard]) -> None:
        self.shards = shards
        self.home: dict[str, _Shard] = {}
        metadata: dict[str, str] = {}
        for shard in shards:
            metadata |= shard.header.metadata
            for name in shard.tensors:
                if name in self.home:
                    raise ValueError(
                        f"{path}: a tensor must be in one shard, got {name} in "
                        f"{self.home[name].path.name} and in {shard.path.name}"
                    )
                self.home[name] = shard
        tensors = {name: t for shard in shards for name, t in shard.tensors.items()}
        super().__init__(path, form, tensors, metadata)
        self.packed = any(shard.layout is not None for shard in shards)
        if self.packed:
            self.notes = ["stored as bits and nonzero values: `dimap expand` gives the dense one"]

    def get(self, name: str) -> Tensor:
        shard = self.home[name]
        try:
            return shard.get(name)
        except SafetensorError as error:
            raise ValueError(f"{shard.path}: {name} could not be read ({error})") from error

    def _writer(self, temporary: Path, ending: str) -> Writer:
        return ShardsWriter({temporary: self.shards[0]})

    def close(self) -> None:
        for shard in self.shards:
            shard.handle.__exit__(None, None, None)


class ShardsWriter(Writer):
    """Files with the headers of others: the same names, order, offsets and metadata."""

    def __init__(self, targets: Mapping[Path, _Shard]) -> None:
        super().__init__({n: t for shard in targets.values() for n, t in shard.tensors.items()})
        self.targets = dict(targets)
        self._files = {n: target for target, shard in targets.items() for n in shard.tensors}
        for target, shard in targets.items():
            target.write_bytes(shard.header.raw)

    def filled(self) -> None:
        """Say that all of `targets` were written by other means than `put`."""
        self._done = len(self.names)

    def _write(self, name: str, tensor: Tensor) -> None:
        flat = tensor.cpu().contiguous().reshape(-1)
        with open(self._files[name], "ab") as file:
            file.write(flat.view(torch.uint8).numpy().data)


def open_single(path: Path) -> Checkpoint:
    """A checkpoint of one file."""
    checkpoint = Shards(path, "safetensors", [_Shard(path)])
    checkpoint.endings = (".safetensors",)
    return checkpoint


class Folder(Shards):
    """A Hugging Face folder: one file, or shards with their index. Its other files are copied."""

    def __init__(self, path: Path) -> None:
        index = path / INDEX
        weight_map: dict[str, str] = {}
        text = b""
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
        super().__init__(path, "folder", [_Shard(path / name) for name in names])
        self.index: bytes | None = None  # of the dense shards
        if weight_map:
            self._check_index(index, weight_map, {n: s for s in self.shards for n in s.stored})
            self.index = text
            if self.packed:
                self.index = _dense_index(text, index)
                self._check_index(index, _weight_map(self.index, index), self.home)
        others = {other for pattern in OTHER_WEIGHTS for other in path.glob(pattern)}
        self.notes += [
            f"{other.name} is kept as it is: its weights are not pruned"
            for other in sorted(others)
            if other.name not in names
        ]

    def _check_index(
        self, index: Path, weight_map: Mapping[str, str], home: Mapping[str, _Shard]
    ) -> None:
        for name, file in weight_map.items():
            if name not in home or home[name].path.name != file:
                raise ValueError(f"{index} must match its shards, got {name}, not in {file}")
        for name, shard in home.items():
            if name not in weight_map:
                raise ValueError(
                    f"{index} must name every tensor of its shards, got no {name}, "
                    f"which is in {shard.path.name}"
                )

    def _writer(self, temporary: Path, ending: str) -> Writer:
        weights = {shard.path.name for shard in self.shards}
        for child in Path(self.path).iterdir():
            if self.packed and self.index is not None and child.name == INDEX:
                (temporary / INDEX).write_bytes(self.index)
            elif child.name not in weights:
                _copy(child, temporary / child.name)
        return ShardsWriter({temporary / shard.path.name: shard for shard in self.shards})


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


def write_packed_index(folder: Path) -> None:
    """Let the index of a folder, that of the dense shards, tell what its bitmask files hold."""
    path = folder / INDEX
    text = path.read_bytes().decode("utf-8")
    dense = json.loads(text)
    headers = {
        file: read_header(folder / file) for file in sorted(set(dense["weight_map"].values()))
    }
    weight_map = {e.name: file for file, header in headers.items() for e in header.entries}
    metadata = dense.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    size = sum(e.end - e.begin for header in headers.values() for e in header.entries)
    metadata |= {"total_size": size, DENSE_KEY: text}
    packed = dense | {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    path.unlink()  # a copy, which may be read-only like the original
    path.write_text(json.dumps(packed, indent=2) + "\n", encoding="utf-8")
