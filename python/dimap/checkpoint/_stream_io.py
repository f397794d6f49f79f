"""Files in pieces that fit a processor's cache, read and written at any place."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._header import Entry, Header

PIECE = 4 << 20  # bytes that are read at a time
MOST_BLOCKS = 64  # in a piece: small tensors
PAGE = 4096  # what direct writing aligns to
DIRECT = 1 << 28  # bytes of a file from which on it is written past the page cache
FLUSH = 128 << 20  # bytes between two requests to bring a file to the disk


class Source(NamedTuple):
    path: Path
    header: Header


class Block(NamedTuple):
    """Weights [start, start + weights) of a tensor; bytes [begin, end) of its file."""

    entry: Entry
    start: int
    weights: int
    begin: int
    end: int


class Piece(NamedTuple):
    """Neighbouring bytes of a file, and the blocks that they are."""

    file: int
    begin: int
    end: int
    blocks: tuple[Block, ...]


def blocks_of(entry: Entry) -> Iterator[Block]:
    """The same blocks in every reading; all but the last hold a multiple of 8 weights."""
    size = entry.dtype.itemsize
    step = PIECE // size
    count = (entry.end - entry.begin) // size
    for start in range(0, count, step):
        n = min(step, count - start)
        begin = entry.begin + start * size
        yield Block(entry, start, n, begin, begin + n * size)


def pieces_of(
    file: int, entries: Sequence[Entry], wanted: Callable[[Block], bool] = lambda block: True
) -> Iterator[Piece]:
    """Pieces that cover the wanted blocks of the entries, which are in the order of their bytes."""
    run: list[Block] = []
    for block in filter(wanted, (block for entry in entries for block in blocks_of(entry))):
        full = run and (
            block.begin != run[-1].end
            or block.end - run[0].begin > PIECE
            or len(run) == MOST_BLOCKS
        )
        if full:
            yield Piece(file, run[0].begin, run[-1].end, tuple(run))
            run = []
        run.append(block)
    if run:
        yield Piece(file, run[0].begin, run[-1].end, tuple(run))


class Buffer:
    """A worker's memory for one piece after the other."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, PIECE + 2 * PAGE))  # begins at a page
        self.bytes: memoryview = memoryview(b"")

    def read(self, descriptor: int, begin: int, end: int, path: Path) -> memoryview:
        """Bytes [begin, end) of a file, as far from a page's beginning as they are in the file."""
        read_into(descriptor, self.room(begin, end), begin, path)
        return self.bytes

    def room(self, begin: int, end: int) -> memoryview:
        """Memory for bytes [begin, end) of a file, to be filled."""
        first = begin % PAGE
        self.bytes = self._memory[first : first + end - begin]
        return self.bytes

    def tensor(self, block: Block, piece: Piece) -> Tensor:
        """The block's weights, flat: in the buffer, or a copy where they lie unaligned."""
        at = block.begin - piece.begin
        size = block.entry.dtype.itemsize
        part = self.bytes[at : at + block.end - block.begin]
        if block.begin % min(size, 8):
            return torch.frombuffer(bytearray(part), dtype=block.entry.dtype)
        return torch.frombuffer(part, dtype=block.entry.dtype)

    def put_back(self, block: Block, piece: Piece, tensor: Tensor) -> None:
        """Bring what was done to a copy into the buffer."""
        if block.begin % min(block.entry.dtype.itemsize, 8):
            at = block.begin - piece.begin
            self.bytes[at : at + block.end - block.begin] = tensor.view(torch.uint8).numpy().data


def read_into(descriptor: int, memory: memoryview, begin: int, path: Path) -> None:
    """Fill the memory with a file's bytes from `begin` on."""
    at = 0
    while at < len(memory):
        with _naming(path):
            got = os.preadv(descriptor, [memory[at:] if at else memory], begin + at)
        if got == 0:
            raise OSError(
                errno.EIO,
                f"must not change while it is read, ended at byte {begin + at}",
                str(path),
            )
        at += got


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[int]]:
    """Descriptors of files, for reading."""
    found: list[int] = []
    try:
        for path in paths:
            found.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        yield found
    finally:
        for descriptor in found:
            os.close(descriptor)


class Outputs:
    """Files that are there and empty, or being filled by other ranks, written at any place.

    Large files are written past the system's page cache where it knows how to: they would push
    everything else out of it, and would have to be copied and flushed later. The page at either end
    of a piece goes through the cache, as it may be another piece's too.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self.paths = paths
        self._descriptors: list[int] = []
        self._direct: list[int | None] = []
        self._unflushed = [0] * len(paths)
        self._lock = threading.Lock()
        # Never created: rank 0 may have given up and removed them by now.
        flags = os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        try:
            for path, size in zip(paths, sizes, strict=True):
                with _naming(path):
                    self._descriptors.append(os.open(path, flags))
                    os.ftruncate(self._descriptors[-1], size)
                self._direct.append(_open_direct(path, flags) if size >= DIRECT else None)
        except BaseException:
            self.__exit__()
            raise

    def write(self, file: int, data: memoryview | bytes, begin: int) -> None:
        """Write bytes at a place; those that a `Buffer` read from the same place need no copy."""
        view = memoryview(data)
        first, last = -begin % PAGE, len(view) - (begin + len(view)) % PAGE
        direct = self._direct[file]
        with _naming(self.paths[file]):
            if direct is not None and last > first and _write_direct(
                direct, view[first:last], begin + first
            ):  # fmt: skip
                _write(self._descriptors[file], view[:first], begin)
                _write(self._descriptors[file], view[last:], begin + last)
                return
            _write(self._descriptors[file], view, begin)
        with self._lock:
            self._unflushed[file] += len(view)
            due = self._unflushed[file] >= FLUSH
            if due:
                self._unflushed[file] = 0
        if due:
            start_flush(self._descriptors[file])

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            with _naming(path):
                os.fsync(descriptor)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (*self._descriptors, *self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors, self._direct = [], []


def _write(descriptor: int, data: memoryview, begin: int) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(descriptor, data[at:], begin + at)


def _open_direct(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags | os.O_DIRECT)
    except (OSError, AttributeError):  # not every file system knows it, nor every system
        return None


def _write_direct(descriptor: int, data: memoryview, begin: int) -> bool:
    """Write whole pages; False where these cannot be written so, and must be written otherwise."""
    try:
        return os.pwrite(descriptor, data, begin) == len(data)
    except OSError as error:
        if error.errno == errno.EINVAL:  # memory, length or place is not aligned enough
            return False
        raise


def start_flush(descriptor: int) -> None:
    """Ask the system to begin writing to the disk what a file has so far; it may not know how."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, 0, 0, 2)  # SYNC_FILE_RANGE_WRITE: begin, do not wait


def _find_sync_file_range() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


_sync_file_range = _find_sync_file_range()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A system call whose error names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
