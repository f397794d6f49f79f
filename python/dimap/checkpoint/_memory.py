"""Checkpoints whose weights are a state dict: files of torch.save, and timm models."""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _timm
from .._files import save_safetensors
from ._types import Checkpoint, Writer, shorten

PICKLED = (".pth", ".pt", ".bin")
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
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        super().__init__(path, form, tensors, metadata)
        self.state, self.root = state, root

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self.state[name]
        return tensor.detach()

    def _writer(self, temporary: Path, ending: str) -> Writer:
        return _StateDictWriter(self, temporary, safetensors=ending == ".safetensors")


class _StateDictWriter(Writer):
    def __init__(self, source: StateDict, target: Path, *, safetensors: bool) -> None:
        super().__init__(source.tensors)
        self._source, self._target, self._safetensors = source, target, safetensors

    def _write(self, name: str, tensor: Tensor) -> None:
        # Into the tensor that is there: it stays a Parameter, or tied to another, if it was so.
        self._source.get(name).copy_(tensor)

    def finish(self) -> None:
        super().finish()
        if self._safetensors:
            state = {name: self._source.get(name) for name in self.names}
            if self.pack:
                from ..bitmask import write_packed  # which opens checkpoints

                source = self._source
                write_packed(self._target, state, source.metadata, self.pack, source.path)
            else:
                save_safetensors(self._target, state, self._source.metadata)
            return
        try:
            with open(self._target, "wb") as file:
                torch.save(self._source.root, file)
        except RuntimeError as error:  # torch's word for a write that failed, over the true one
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(errno.EIO, f"could not be written ({error})") from error


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
