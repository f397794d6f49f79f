"""What is done, told so that a command that crashed continues: one JSON object a line.

A line is appended under a lock, in one write, and brought to the disk. A line that a crash tore is
passed over, and the next one begins on a line of its own. The last line of an output counts.

A file is told by its SHA-256. Bytes are read again for it only where a file's length, times or
inode are not those that were recorded with the hash: continuing costs a few system calls a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .._files import naming

if sys.platform != "win32":
    import fcntl

NAME = "dimap-manifest.jsonl"
VERSION = 1
CHUNK = 4 << 20  # bytes that are hashed at a time


class File(NamedTuple):
    """path: relative to the checkpoint or output folder. stamp: its times and inode then."""

    path: str
    bytes: int
    sha256: str
    stamp: tuple[int, ...]


class Manifest:
    """The lines of one folder; any number of processes may append to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def read(self) -> dict[str, dict[str, Any]]:
        """The last line of every output: its name -> the line.

        Raises ValueError where a line is of a later version.
        """
        found: dict[str, dict[str, Any]] = {}
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
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        with naming(self.path):
            descriptor = os.open(self.path, flags, 0o666)
            try:
                if sys.platform != "win32":
                    fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
                end = os.lseek(descriptor, 0, os.SEEK_END)
                if end:
                    os.lseek(descriptor, end - 1, os.SEEK_SET)
                    if os.read(descriptor, 1) != b"\n":
                        line = b"\n" + line
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def files_of(path: Path) -> list[Path]:
    """A file itself; all files in a folder, symbolic links followed."""
    if not path.is_dir():
        return [path]
    return sorted(
        Path(folder) / file
        for folder, _, files in os.walk(path, followlinks=True)
        for file in files
    )


def stamp_of(path: Path) -> tuple[int, ...]:
    """Length, times and inode: other bytes come with another stamp."""
    found = path.stat()
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def stamps_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The stamps of a checkpoint's files."""
    return {_relative(file, path): stamp_of(file) for file in files_of(path)}


def hashed(paths: Sequence[Path], threads: int = 1) -> list[list[File]]:
    """The files of every checkpoint, read, as many at a time as there are threads."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        begun = [
            [pool.submit(_hash, file, _relative(file, path)) for file in files_of(path)]
            for path in paths
        ]
        return [[file.result() for file in files] for files in begun]


def same_files(path: Path, recorded: Sequence[dict[str, Any]], threads: int = 1) -> bool:
    """Whether a checkpoint's files are, byte by byte, those that were recorded."""
    known = {file.path: file for file in (File(**row) for row in recorded)}
    stamps = stamps_of(path)
    if {name: stamp[0] for name, stamp in stamps.items()} != {
        f.path: f.bytes for f in known.values()
    }:
        return False
    unsure = [name for name, stamp in stamps.items() if stamp != tuple(known[name].stamp)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        root = path if path.is_dir() else path.parent
        found = pool.map(lambda name: _hash(root / name, name).sha256 == known[name].sha256, unsure)
        return all(found)


def _relative(file: Path, checkpoint: Path) -> str:
    return file.name if file == checkpoint else file.relative_to(checkpoint).as_posix()


def _hash(file: Path, name: str) -> File:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    stamp = stamp_of(file)
    with naming(file), open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return File(name, stamp[0], digest.hexdigest(), stamp)
