"""What `dimap._C` is given and tells, where it works on files: descriptors, elements, progress."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .._files import naming
from .base import Progress
from .header import Entry, Header

READ, FILL = os.O_RDONLY, os.O_RDWR


class Told:
    """What `_C` tells of its work, told to a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._step, self._done, self._total = "", 0, 0

    def __call__(self, step: str, done: int, total: int) -> None:
        if done == 0 and (step != self._step or self._done > 0):
            self.finish()
            self._step, self._done, self._total = step, 0, total
            self._progress.step(step, total)
        elif done > self._done:
            self._progress.advance(done - self._done)
            self._done = done

    def finish(self) -> None:
        """The last step is done."""
        if self._done < self._total:
            self._progress.advance(self._total - self._done)
            self._done = self._total


def elements(entry: Entry) -> tuple[int, int, int, int]:
    """What `_C` counts: (offset, elements, bytes of one, mask); where several share a byte, bytes."""
    size = entry.dtype.size or 1
    return entry.begin, entry.nbytes // size, size, entry.dtype.mask


@contextmanager
def opened(paths: Sequence[Path], flags: int) -> Iterator[list[tuple[int, str]]]:
    """Descriptors of files that exist, and their paths; flags: READ, or FILL for outputs.

    Outputs are never created: rank 0 may have given up and removed them by now.
    """
    if flags == FILL:
        flags |= os.O_NOFOLLOW
    with ExitStack() as stack:
        found: list[tuple[int, str]] = []
        for path in paths:
            name = str(path).encode("utf-8", "backslashreplace").decode()  # which need not be UTF-8
            found.append((os.open(path, flags | os.O_CLOEXEC), name))
            stack.callback(os.close, found[-1][0])
        yield found


def begin(output: tuple[int, str], header: Header, *, first: bool = True) -> None:
    """Give an output its length; the first of several ranks writes the header."""
    descriptor, path = output
    with naming(Path(path)):
        os.ftruncate(descriptor, header.file_size)
    if first:
        write_fully(output, memoryview(header.raw), 0)


def read_fully(source: tuple[int, str], size: int, at: int) -> bytes:
    """Bytes of an open file, its descriptor and path, from `at` on."""
    data = b""
    with naming(Path(source[1])):
        while len(data) < size:  # one call reads no more than 2 GiB, and less after a signal
            more = os.pread(source[0], size - len(data), at + len(data))
            if not more:
                problem = f"must not change while it is read, ended at byte {at + len(data)}"
                raise OSError(errno.EIO, problem, source[1])
            data = data + more if data else more
    return data


def write_fully(output: tuple[int, str], data: memoryview, at: int) -> None:
    """Write bytes to an open file from `at` on."""
    with naming(Path(output[1])):
        while data:
            done = os.pwrite(output[0], data, at)
            at, data = at + done, data[done:]
