"""Checkpoints in and out: a safetensors file, a Hugging Face folder, a .pth file, a timm model.

A `Checkpoint` lists names, shapes and dtypes and gives tensors one at a time; its `create` gives a
`Writer` that takes them back. Only weights change: metadata, index, optimizer state and a folder's
other files are carried over.

    with open_checkpoint("in.safetensors") as source, source.create("out.safetensors") as writer:
        for name in writer.names:
            writer.put(name, source.get(name))

Rooms: `header` (safetensors headers), `bitmask` (the sparse format), `folder` (files and folders of
safetensors), `memory` (state dicts; imports torch), `prune` and `expand` (from files to files); and of
many checkpoints: `inputs` (which), `manifest` (what is done), `many` (one of them), `workers` (--jobs).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .base import Checkpoint, Writer
from .folder import Folder, open_file
from .header import Spec

__all__ = ["PICKLED", "Checkpoint", "Spec", "Writer", "open_checkpoint"]

PICKLED = (".pth", ".pt", ".bin")  # endings of files of torch.save


def open_checkpoint(path: str | os.PathLike[str], *, random_init: bool = False) -> Checkpoint:
    """Open a checkpoint for reading; use it in a `with` block.

    path: a .safetensors file; a folder with model.safetensors or model.safetensors.index.json
        and its shards; a .pth, .pt or .bin file (read with weights_only=True), whose weights may
        lie under "model" or "state_dict"; or "timm:NAME", a timm model with pretrained weights.
    random_init: give a timm model fresh weights (seed 0) instead, for a dry run.

    Raises FileNotFoundError or another OSError where a file cannot be read, ValueError where it is
    not what it should be, ModuleNotFoundError where timm is needed and missing.
    """
    text = os.fspath(path)
    if text.startswith("timm:"):
        from .memory import open_timm

        return open_timm(text, random_init=random_init)
    if random_init:
        raise ValueError(f"random weights (--random-init) are only for timm:NAME, got {text}")
    file = Path(text)
    if file.is_dir():
        return Folder(file)
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
    if file.suffix == ".safetensors":
        return open_file(file)
    if file.suffix in PICKLED:
        from .memory import open_pickled

        return open_pickled(file)
    raise ValueError(
        f"{text} must be a folder, timm:NAME, or a file that ends in .safetensors, "
        f"{', '.join(PICKLED[:-1])} or {PICKLED[-1]}"
    )
