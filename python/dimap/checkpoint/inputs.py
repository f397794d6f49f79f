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
import json
import os
import re
from collections.abc import Iterator, Sequence
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
        for source, name in _expand(argument, out_dir):
            place = source if source.startswith(TIMM) else Path(source).resolve()
            items.setdefault(place, Item(source, name, _size(source)))  # once, if named twice
    return list(items.values())


def _expand(argument: str, out_dir: Path) -> Iterator[tuple[str, str]]:
    """The checkpoints of one argument, and the names of their outputs."""
    path = Path(argument)
    if argument.startswith(TIMM):
        yield argument, argument.removeprefix(TIMM).replace("/", "-") + ".safetensors"
    elif path.is_dir() and not _is_checkpoint(path):
        yield from _inside(path, out_dir)
    elif os.path.lexists(path):
        _check_no_shard(path)
        yield argument, path.resolve().name if path.name in ("", "..") else path.name
    elif glob.has_magic(argument):
        yield from _matches(argument, out_dir)
    else:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argument)


def _inside(folder: Path, out_dir: Path) -> Iterator[tuple[str, str]]:
    """The checkpoints directly in a folder; what has a hidden name is left out."""
    if folder.resolve() == out_dir.resolve():
        raise ValueError(f"--out-dir must lie apart from IN, got {out_dir} for both")
    children = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    found = [p for p in children if _is_checkpoint(p) and not _within(p, out_dir)]
    if not found:
        raise FileNotFoundError(
            errno.ENOENT,
            f"must be a checkpoint ({SINGLE} or {INDEX}), or hold checkpoints "
            f"({', '.join(ENDINGS)}, or folders with {SINGLE} or {INDEX})",
            str(folder),
        )
    for path in found:
        _check_no_shard(path)
        yield str(path), path.name


def _matches(pattern: str, out_dir: Path) -> Iterator[tuple[str, str]]:
    """The checkpoints that match a pattern, outputs of an earlier run left out."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    found = [p for p in found if _is_checkpoint(p) and not _within(p, out_dir)]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "must match a checkpoint, matches none", pattern)
    for path in found:
        _check_no_shard(path)
        yield str(path), path.relative_to(base).as_posix()


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return (path / SINGLE).exists() or (path / INDEX).exists()
    return path.suffix in ENDINGS


def _within(path: Path, folder: Path) -> bool:
    place = path.resolve()
    return folder.resolve() in (place, *place.parents)


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


def _size(source: str) -> int:
    path = Path(source)
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())
