"""What is done, told so that a command that crashed continues: one JSON object a line.

A line is appended under a lock, in one write, and brought to the disk. A line that a crash tore is
passed over, and the next one begins on a line of its own. The last line of an output counts.

A file is known again by its length, times and inode: continuing costs a few system calls a file.
Where these are others and a SHA-256 was noted, the file's bytes are read and compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .._files import naming

NAME = "dimap-manifest.jsonl"
VERSION = 1
CHUNK = 4 << 20  # bytes that are hashed at a time

Record = dict[str, Any]  # a line of the manifest, or what it says of a file


class Manifest:
    """The lines of one folder; any number of processes may append to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def read(self) -> dict[str, Record]:
        """The last line of every output: its name -> the line.

        Raises ValueError where a line is of a later version.
        """
        found: dict[str, Record] = {}
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return found
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                version, name = record["version"], record["out"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # torn; what it told is done again
            if version != VERSION:
                raise ValueError(
                    f"{self.path} must be of version {VERSION}, got {version}: this dimap "
                    "cannot tell what is done"
                )
            found[name] = record
        return found

    def append(self, name: str, state: str, **more: Any) -> None:
        """Add a line; it is on the disk when this returns."""
        record = {"version": VERSION, "out": name, "state": state, **more}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with naming(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
                end = os.lseek(descriptor, 0, os.SEEK_END)
                if end and os.pread(descriptor, 1, end - 1) != b"\n":
                    line = b"\n" + line
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def files_of(path: Path, checksum: bool = False) -> list[Record]:
    """What the manifest says of a file, or of all files in a folder, symbolic links followed.

    path: relative to the folder. stamp: length, times and inode. sha256: None without `checksum`.
    """
    files = [path]
    if path.is_dir():
        walked = os.walk(path, followlinks=True)
        files = sorted(Path(folder) / file for folder, _, names in walked for file in names)
    names = [str(file.relative_to(path)) if file != path else file.name for file in files]
    stamps = [_stamp(file) for file in files]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(_sha256, files) if checksum else [None] * len(files)
        return [
            {"path": name, "bytes": stamp[0], "sha256": sha256, "stamp": stamp}
            for name, stamp, sha256 in zip(names, stamps, sums, strict=True)
        ]


def same_stamps(some: Sequence[Record], others: Sequence[Record]) -> bool:
    """Whether two lists tell of the same files, none of which was written to between."""
    return [(f["path"], f["stamp"]) for f in some] == [(f["path"], f["stamp"]) for f in others]


def same_files(path: Path, recorded: Sequence[Record]) -> bool:
    """Whether a checkpoint's files are those that were recorded, by stamp or by SHA-256."""
    here = files_of(path)
    if [(f["path"], f["bytes"]) for f in here] != [(f["path"], f["bytes"]) for f in recorded]:
        return False
    folder = path if path.is_dir() else path.parent
    return all(
        new["stamp"] == old["stamp"]
        or (old["sha256"] is not None and old["sha256"] == _sha256(folder / old["path"]))
        for new, old in zip(here, recorded, strict=True)
    )


def _stamp(path: Path) -> list[int]:
    """Length, times and inode: other bytes come with another stamp."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with naming(path), open(path, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
