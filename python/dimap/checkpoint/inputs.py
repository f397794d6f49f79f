"""Which checkpoints a list of files, folders and patterns means, and where each one's output goes.

IN                                  output under DIR
a.safetensors                       a.safetensors
llm/  (model.safetensors or index)  llm/
runs/ (any other folder)            every checkpoint directly in it, under its own name
"runs/*/best.pth"                   a/best.pth, b/best.pth: what the pattern's wildcards matched
timm:NAME                           NAME.safetensors
hf:ORG/NAME                         NAME/
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import HUB, TIMM
from .locate import INDEX, PICKLED, SINGLE, check_no_shard, holds_weights, known_weights

ENDINGS = (".safetensors", *PICKLED)


@dataclass(frozen=True)
class Item:
    """A checkpoint to be pruned.

    source: its path, or timm:NAME.
    name: of its output, relative to the output folder, with forward slashes.
    size: bytes of its weights and other files, 0 for what is no path.
    """

    source: str
    name: str
    size: int

    @property
    def path(self) -> Path | None:
        """None for timm:NAME and hf:ORG/NAME."""
        return None if self.source.startswith((TIMM, HUB)) else Path(self.source)


def find_inputs(arguments: Sequence[str], out_dir: Path) -> list[Item]:
    """The checkpoints that the arguments mean, in their order.

    Raises FileNotFoundError for an argument that is or matches nothing, ValueError for a file that
    is one of a checkpoint's shards: these are not pruned apart from each other.
    """
    items: dict[Path | str, Item] = {}
    for argument in arguments:
        if argument.startswith((TIMM, HUB)):
            name = argument.partition(":")[2].replace("/", "-")
            name = f"{name}.safetensors" if argument.startswith(TIMM) else name
            items.setdefault(argument, Item(argument, name, 0))
            continue
        for path, name in _expand(argument, out_dir):
            if path.is_file():
                check_no_shard(path)
            source = argument if path == Path(argument) else str(path)
            # Once, if it is named twice.
            items.setdefault(path.resolve(), Item(source, name, _size(path)))
    return list(items.values())


def _expand(argument: str, out_dir: Path) -> list[tuple[Path, str]]:
    """The checkpoints of one argument, without outputs of an earlier run; and their outputs' names."""
    path = Path(argument)
    if path.is_dir() and not _is_checkpoint(path):
        if path.resolve() == out_dir.resolve():
            raise ValueError(f"--out-dir must lie apart from IN, got {out_dir} for both")
        base, candidates = path, [p for p in path.iterdir() if not p.name.startswith(".")]
        wanted = (
            f"must be a checkpoint ({SINGLE} or {INDEX}), or hold checkpoints "
            f"({', '.join(ENDINGS)}, or folders with {SINGLE} or {INDEX})"
        )
    elif os.path.lexists(path):
        return [(path, path.resolve().name if path.name in ("", "..") else path.name)]
    elif glob.has_magic(argument):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        base, candidates = Path(*fixed), [Path(p) for p in glob.glob(argument, recursive=True)]
        wanted = "must match a checkpoint, matches none"
    else:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argument)
    made = out_dir.resolve()
    found = [p for p in sorted(candidates) if _is_checkpoint(p)]
    found = [p for p in found if not p.resolve().is_relative_to(made)]
    if not found:
        raise FileNotFoundError(errno.ENOENT, wanted, argument)
    return [(p, p.relative_to(base).as_posix()) for p in found]


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return known_weights(child.name for child in path.iterdir()) is not None
    return holds_weights(path)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())
