"""Which checkpoints a list of files, folders and patterns means, and where each one's output goes.

IN                                  output under DIR
a.safetensors                       a.safetensors
llm/  (model.safetensors or index)  llm/
runs/ (any other folder)            every checkpoint directly in it, under its own name
"runs/*/best.pth"                   a/best.pth, b/best.pth: what the pattern's wildcards matched
timm:NAME                           NAME.safetensors
"""

from __future__ import annotations

import errno
import glob
import itertools
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import PICKLED
from .base import INDEX, SINGLE

ENDINGS = (".safetensors", *PICKLED)
TIMM = "timm:"
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.[a-z]+")  # model-00001-of-00003.safetensors


@dataclass(frozen=True)
class Item:
    """A checkpoint to be pruned.

    source: its path, or timm:NAME.
    name: of its output, relative to the output folder, with forward slashes.
    size: bytes of its weights and other files, 0 for timm:NAME.
    """

    source: str
    name: str
    size: int


def find_inputs(arguments: Sequence[str], out_dir: Path) -> list[Item]:
    """The checkpoints that the arguments mean, in their order.

    Raises FileNotFoundError for an argument that is or matches nothing, ValueError for a file that
    is one of a checkpoint's shards: these are not pruned apart from each other.
    """
    items: dict[Path | str, Item] = {}
    for argument in arguments:
        if argument.startswith(TIMM):
            name = argument.removeprefix(TIMM).replace("/", "-") + ".safetensors"
            items.setdefault(argument, Item(argument, name, 0))
            continue
        for path, name in _expand(argument, out_dir):
            _check_no_shard(path)
            source = argument if path == Path(argument) else str(path)
            items.setdefault(
                path.resolve(), Item(source, name, _size(path))
            )  # once, if named twice
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
        return (path / SINGLE).exists() or (path / INDEX).exists()
    return path.suffix in ENDINGS


def _check_no_shard(path: Path) -> None:
    """A shard alone has thresholds of its own: its weights would not be what DIMAP keeps."""
    index = path.parent / INDEX
    names: object = None
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        names = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    named = isinstance(names, dict) and path.name in names.values()
    if path.is_file() and (named or SHARD.fullmatch(path.name)):
        raise ValueError(
            f"{path} must be a whole checkpoint, got one of its shards; give the folder with {INDEX}"
        )


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())
