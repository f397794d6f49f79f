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

from ._checkpoint_types import INDEX, SINGLE, Checkpoint, Writer, shorten
from ._files import naming, open_safetensors
from ._safetensors_header import read_header, unique

# Weights in a folder that are not the ones that are pruned.
OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack")


class _Shard:
    """One file: validated by the library, its header kept for a copy of it byte by byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = open_safetensors(path)
        with naming(path):
            self.header = read_header(path)
        # In the order of their bytes: so they are written, one after the other.
        self.tensors = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for entry in self.header.entries
        }


class Shards(Checkpoint):
    """Tensors of one or more files, in the order of the files and of the tensors in them."""

    def __init__(self, path: Path, form: str, shards: list[_Shard]) -> None:
        self.shards = shards
        self.home: dict[str, _Shard] = {}
        metadata: dict[str, str] = {}
        for shard in shards:
            metadata |= shard.handle.metadata() or {}
            for name in shard.tensors:
                if name in self.home:
                    raise ValueError(
                        f"{path}: a tensor must be in one shard, got {name} in "
                        f"{self.home[name].path.name} and in {shard.path.name}"
                    )
                self.home[name] = shard
        tensors = {name: t for shard in shards for name, t in shard.tensors.items()}
        super().__init__(path, form, tensors, metadata)

    def get(self, name: str) -> Tensor:
        shard = self.home[name]
        try:
            tensor: Tensor = shard.handle.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{shard.path}: {name} could not be read ({error})") from error
        return tensor

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
        if (path / SINGLE).exists():  # transformers prefers it to an index, too
            names = [SINGLE]
        elif index.exists():
            weight_map = _read_index(index)
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
        if weight_map:
            self._check_index(index, weight_map)
        others = {other for pattern in OTHER_WEIGHTS for other in path.glob(pattern)}
        self.notes = [
            f"{other.name} is kept as it is: its weights are not pruned"
            for other in sorted(others)
            if other.name not in names
        ]

    def _check_index(self, index: Path, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.home or self.home[name].path.name != file:
                raise ValueError(f"{index} must match its shards, got {name}, not in {file}")
        for name, shard in self.home.items():
            if name not in weight_map:
                raise ValueError(
                    f"{index} must name every tensor of its shards, got no {name}, "
                    f"which is in {shard.path.name}"
                )

    def _writer(self, temporary: Path, ending: str) -> Writer:
        weights = {shard.path.name for shard in self.shards}
        for child in Path(self.path).iterdir():
            if child.name not in weights:
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


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> name of a file beside it."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
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
