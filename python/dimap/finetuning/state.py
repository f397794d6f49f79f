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
from torch import Tensor

from .._files import replacing, save_safetensors
from .settings import HISTORY, STATE

BEST, LAST = "best.safetensors", "last.safetensors"
VERSION = 2


class Folder:
    """The folder of a run. state: what the run to resume had; None where one begins."""

    def __init__(self, path: Path, *, resume: bool, force: bool) -> None:
        """Check that the folder is free for a new run, or read the state of one to resume.

        Raises FileExistsError where another run is there, FileNotFoundError where a folder holds
        none to resume, another OSError where it is no folder, ValueError where the state cannot be
        read.
        """
        self.path = path
        self.state: dict[str, Any] | None = None
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "must be a folder, got a file", str(path))
        there = [name for name in (STATE, BEST, LAST, HISTORY) if (path / name).exists()]
        if resume and STATE in there:
            self.state = _read(path / STATE)
        elif resume and path.exists() and not there:
            held = (
                ", ".join(sorted(child.name for child in path.iterdir())[:6]) or "an empty folder"
            )
            problem = (
                f"must hold a run for --resume ({STATE}), got {held}; without --resume one begins"
            )
            raise FileNotFoundError(errno.ENOENT, problem, str(path))
        elif there and not force and not resume:
            raise FileExistsError(
                errno.EEXIST,
                "is there from another run, which --resume continues and --force replaces",
                str(path / there[0]),
            )

    def clear(self) -> None:
        """Let an older run's files make room for one that begins."""
        for name in (STATE, BEST, LAST, HISTORY) if self.state is None else ():
            (self.path / name).unlink(missing_ok=True)

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Refuse to resume a run that was of other settings, data, weights or masks."""
        then = self.state["identity"] if self.state else identity
        for name, value in identity.items():
            if then.get(name) != value:
                raise ValueError(
                    f"{name} must be what it was to resume {self.path}: {then.get(name)}, got {value}"
                )

    def save_epoch(
        self,
        weights: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        state: Mapping[str, Any],
        *,
        best: bool,
    ) -> None:
        """Write all files of an epoch; metadata goes into those of the weights.

        state: what `resume` reads, "identity" and "history" of the run in it. best: whether no
        earlier epoch was better.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (BEST, LAST) if best else (LAST,):
            with replacing(self.path / name, force=True) as temporary:
                save_safetensors(temporary, weights, metadata)
        with replacing(self.path / HISTORY, force=True) as temporary:
            told = {"settings": state["identity"], "epochs": state["history"]}
            temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        with replacing(self.path / STATE, force=True) as temporary, open(temporary, "wb") as file:
            torch.save({"dimap_finetune": VERSION, **state}, file)


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
