"""Checkpoints whose weights are a state dict: files of torch.save, and timm models."""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _timm
from .._files import save_safetensors
from . import PICKLED
from .base import Checkpoint, Writer, shorten
from .bitmask import write_packed
from .header import Spec, dtype_of

# Keys under which training scripts put the weights.
NESTS = ("model", "state_dict", "model_state_dict", "model_state")


class StateDict(Checkpoint):
    """A state dict in memory, or mapped from its file.

    state: the weights; a part of `root`, which is what a .pth output stores.
    """

    endings = (".safetensors", *PICKLED)

    def __init__(
        self,
        path: str | os.PathLike[str],
        form: str,
        state: Mapping[str, Any],
        *,
        root: Any,
        metadata: Mapping[str, str],
    ) -> None:
        tensors = {
            name: Spec(dtype_of(value.dtype), tuple(value.shape))
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        super().__init__(path, form, tensors, metadata)
        self.state, self.root = state, root

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self.state[name]
        return tensor.detach()

    def save(self, target: Path, ending: str, pack: Collection[str] = ()) -> None:
        """Fill the empty file with what the tensors are now.

        ending: that the output is to have. pack: of a safetensors file, the tensors that are stored
        as bits and values where that is smaller.
        """
        if ending == ".safetensors":
            state = {name: self.get(name) for name in self.tensors}
            if pack:
                write_packed(target, state, self.metadata, pack, self.path)
            else:
                save_safetensors(target, state, self.metadata)
            return
        try:
            with open(target, "wb") as file:
                torch.save(self.root, file)
        except RuntimeError as error:  # torch's word for a write that failed, over the true one
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(errno.EIO, f"could not be written ({error})") from error

    def _writer(self, files: list[Path], ending: str) -> Writer:
        # Into the tensor that is there: it stays a Parameter, or tied to another, if it was so.
        return Writer(
            self.tensors,
            lambda name, tensor: self.get(name).copy_(tensor),
            lambda: self.save(files[0], ending),
        )


def open_timm(path: str, *, random_init: bool) -> StateDict:
    """The weights of "timm:NAME"; its outputs name the architecture in their metadata."""
    name = path.removeprefix("timm:")
    state = _timm.create(name, pretrained=not random_init).state_dict()
    return StateDict(
        path, "timm", state, root=state, metadata={"format": "pt", "architecture": name}
    )


def open_pickled(path: Path) -> StateDict:
    """The weights of a file of torch.save, at its top or under one of `NESTS`."""
    root = _load(path)
    state, place = root, str(path)
    while isinstance(state, Mapping):
        nests = [key for key in NESTS if isinstance(state.get(key), Mapping)]
        if len(nests) > 1:
            found = " and ".join(map(repr, nests))
            raise ValueError(f"{place} must hold one set of weights, got {found}")
        if not nests:
            break
        state, place = state[nests[0]], f"{place}[{nests[0]!r}]"
    if not isinstance(state, Mapping):
        raise ValueError(f"{place} must hold a state dict, got a {type(state).__name__}")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{place} must hold weights, or hold them under {' or '.join(map(repr, NESTS))}, got "
            f"{shorten(map(repr, state)) or 'an empty dict'}"
        )
    for name in state:
        if not isinstance(name, str):
            raise ValueError(f"{place} must have strings for names, got {name!r}")
    return StateDict(path, "pickled", state, root=root, metadata={"format": "pt"})


def _load(path: Path) -> Any:
    with open(path, "rb"):
        pass  # for Python's own errors, which name the file
    try:
        # Files of torch < 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} must hold weights and plain values only (it is read with "
                f"weights_only=True), got {found[1]}; if you trust the file, load it with "
                "torch.load(..., weights_only=False) and save its weights alone"
            ) from error
        raise ValueError(
            f"{path} must be a complete file of torch.save, got one that is truncated, damaged or "
            f"of another format ({type(error).__name__})"
        ) from error
