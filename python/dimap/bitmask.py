"""Sparse checkpoints in fewer bytes: one bit a weight, and the nonzero values.

A bitmask file is a safetensors file that stands for a dense one and gives it back bit by bit. It is
written by `save_file`, `dimap.prune_checkpoint(..., bitmask=True)` and `dimap prune --format bitmask`,
and read by `load_file`, `expand` and `dimap expand`. The format is described in docs/format.md.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import ops
from ._files import replacing
from .checkpoint._bitmask_expand import expand_checkpoint
from .checkpoint._bitmask_layout import CODES, PACKED, lay_out, make_header, pays
from .checkpoint._safetensors import Folder, Shards, open_single
from .checkpoint._stream_types import Progress, Silent
from .checkpoint._types import Checkpoint

__all__ = ["expand", "load_file", "save_file"]


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, or a folder of them, bitmask or dense: name -> tensor on the CPU.

    Returns the tensors in the order of the dense file, bit by bit as they were. With a file
    `safetensors.torch.load_file` would read, it returns the same.

    Raises OSError where a file cannot be read; ValueError where it is damaged, holds no tensors, or
    is of a version of the bitmask format that this dimap does not know.
    """
    with _open(path) as checkpoint:
        return {name: checkpoint.get(name) for name in checkpoint.tensors}


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a bitmask file; a file that is there already is replaced.

    tensors: name -> tensor of any device and of a dtype that safetensors have. Those of float32,
        bfloat16 and float16 are packed where that makes them smaller, the others stored as they are.
    metadata: strings to store beside them.

    Raises TypeError for what is no tensor, or not of strings; ValueError for tensors that cannot be
    stored; OSError where the file cannot be written. The file appears complete or not at all.
    """
    _check(tensors, metadata or {})
    with replacing(Path(path), force=True) as temporary:
        write_packed(temporary, tensors, metadata or {}, tensors, str(path))


def expand(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the dense file (or folder) that a bitmask file (or folder of them) stands for.

    The source is read piece by piece, however large its tensors are. The dense file is that which
    was pruned, byte by byte, but for the weights set to zero. `target` appears complete or not at all.

    force: replace an output that is there already.

    Raises ValueError for a source that is not a bitmask file, is damaged or of a version that this
    dimap does not know; OSError where files cannot be read or written; FileExistsError where the
    output exists and not `force`.
    """
    with _open(source) as checkpoint:
        assert isinstance(checkpoint, Shards)
        expand_checkpoint(checkpoint, target, force=force, progress=progress or Silent())


def write_packed(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    pack: Collection[str],
    where: str,
) -> None:
    """Fill the empty file with tensors, those in `pack` packed where that makes them smaller."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    described = [(name, tensors[name].dtype, list(tensors[name].shape)) for name in order]
    dense = make_header(described, metadata, where)
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    for entry in dense.entries:
        if entry.name in pack and entry.dtype in PACKED:
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
            tensor = parts[entry.name].detach().resolve_conj().resolve_neg()
            flat = tensor.cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)


def _open(path: str | os.PathLike[str]) -> Checkpoint:
    return Folder(Path(path)) if os.path.isdir(path) else open_single(Path(path))


def _check(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"tensors must map names to tensors, got {name!r}: {type(tensor).__name__}"
            )
        if name == "__metadata__":
            raise ValueError(f"tensors must not be called {name!r}: the file format uses it")
        if tensor.dtype not in CODES:
            raise ValueError(f"{name} must have a dtype of safetensors, got {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} must be a dense tensor with weights, got a {kind} one")
