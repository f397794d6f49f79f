"""The files of a run, and how it goes on after an interruption.

    OUT/best.safetensors   the weights of the best epoch, under the dense model's names
    OUT/last.safetensors   those of the last epoch
    OUT/history.json       settings, and a row for each epoch
    OUT/state.pt           all that --resume needs, written after the others

Each appears complete or not at all; `state.pt` last, so that an interrupted epoch is done again
from its start and writes the same files.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import replacing, save_safetensors

BEST, LAST, HISTORY, STATE = "best.safetensors", "last.safetensors", "history.json", "state.pt"
VERSION = 1


class Folder:
    """The folder of a run."""

    def __init__(self, path: Path, *, resume: bool, force: bool) -> None:
        """Check that the folder is free for a new run, or read the state of one to resume.

        Raises FileExistsError where another run is there, OSError where it is no folder, ValueError
        where the state cannot be read.
        """
        self.path = path
        self.state: dict[str, Any] | None = None
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "must be a folder, got a file", str(path))
        there = [name for name in (STATE, BEST, LAST, HISTORY) if (path / name).exists()]
        if resume and STATE in there:
            self.state = _read(path / STATE)
        elif there and not force and not resume:
            raise FileExistsError(
                errno.EEXIST,
                "is there from another run, which --resume continues and --force replaces",
                str(path / there[0]),
            )

    def create(self) -> None:
        """Make the folder; an older run's files make room."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.state is None:
            for name in (STATE, BEST, LAST, HISTORY):
                (self.path / name).unlink(missing_ok=True)

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Refuse to resume a run that was of other settings, data, weights or masks."""
        assert self.state is not None
        for name, value in identity.items():
            if self.state["identity"].get(name) != value:
                then, now = self.state["identity"].get(name), value
                raise ValueError(
                    f"{name} must be what it was to resume {self.path}: {then}, got {now}"
                )

    def save_epoch(
        self,
        model: nn.Module,
        metadata: Mapping[str, str],
        identity: Mapping[str, Any],
        history: list[dict[str, Any]],
        state: Mapping[str, Any],
        *,
        best: bool,
    ) -> None:
        """Write all files of an epoch; metadata goes into those of the weights.

        state: what `resume` reads. best: whether no earlier epoch was better.
        """
        for name in (BEST, LAST) if best else (LAST,):
            with replacing(self.path / name, force=True) as temporary:
                save_safetensors(temporary, model.state_dict(), metadata)
        with replacing(self.path / HISTORY, force=True) as temporary:
            text = json.dumps({"settings": dict(identity), "epochs": history}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        state = {"dimap_finetune": VERSION, **state, "identity": identity, "history": history}
        with replacing(self.path / STATE, force=True) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} must be the complete state of a run ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or state.get("dimap_finetune") != VERSION:
        raise ValueError(f"{path} must be the state of a run of this version of dimap")
    return state


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short digest of names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
