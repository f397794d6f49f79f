"""What version 2 of the bitmask format keeps of a tensor: blocks of bits and byte planes, by zstd.

Each block stands alone, so that any number of threads make them, and read them back. The format is
written down in docs/format.md; a file is hostile until it is checked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from struct import Struct
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from zlib import crc32

from .. import _C
from .._files import naming
from .header import DTYPES, Entry, Header, make_header, refuse
from .native import read_fully

if TYPE_CHECKING:
    import zstandard

T = TypeVar("T")
R = TypeVar("R")

STEP = 1 << 21  # bytes of a dense tensor in a block, about
MOST_IN_BLOCK = 1 << 24  # that a reader takes
LEVEL = 1  # higher ones are slower by far and gain less than a percent
ROW = Struct("<III")  # of each block: its elements, the bytes of its frame, the last 4 of these
END = Struct("<II")  # how many rows; CRC-32 of the tensor's name and them

_compressors: list[zstandard.ZstdCompressor] = []  # those that no thread uses at the moment
_decompressors: list[zstandard.ZstdDecompressor] = []


class Block(NamedTuple):
    """One block of a tensor. at, size: of its frame in the file. first: of its elements."""

    at: int
    size: int
    check: int
    first: int
    elements: int


class Writer:
    """A compact file, made of the bytes of its dense one as they come.

    file: the empty file. dense: the dense file's header. metadata: what the file is to hold.
    """

    def __init__(self, file: Path, dense: Header, metadata: Mapping[str, str], where: str) -> None:
        self._path, self._dense, self._metadata, self._where = file, dense, metadata, where
        self._begins = [entry.begin for entry in dense.entries]
        self._sizes: list[int] = []  # of the tensors that are complete
        self._rows: list[bytes] = []  # of the one that is not
        # The sizes are known at the end. These are above them, and take no fewer digits.
        self._start = len(self._header([2 * e.nbytes + 1024 for e in dense.entries]).raw)
        self._begun = self._start
        self._next = len(dense.raw)  # the byte of the dense file that is written next
        self._waiting: dict[int, tuple[int, list[tuple[int, int, bytes]]]] = {}
        self._lock = Lock()
        self._file = open(file, "r+b")  # noqa: SIM115 - closed by `__exit__`
        self._file.seek(self._start)

    def put(self, at: int, data: memoryview) -> None:
        """Take bytes of the dense file, whole elements, from its byte `at` on, from any thread.

        What comes before its turn waits in memory, compressed.
        """
        blocks = list(self._compress(at, data))
        with self._lock, naming(self._path):
            self._waiting[at] = len(data), blocks
            while self._next in self._waiting:
                size, blocks = self._waiting.pop(self._next)
                self._next += size
                for number, elements, frame in blocks:
                    self._end_before(number)
                    check = int.from_bytes(frame[-4:], "little")
                    self._rows.append(ROW.pack(elements, len(frame), check))
                    self._file.write(frame)

    def _compress(self, at: int, data: memoryview) -> Iterator[tuple[int, int, bytes]]:
        """A block for each tensor that has a part in the bytes: its number, elements and frame."""
        while data:
            number = bisect_right(self._begins, at) - 1
            entry = self._dense.entries[number]
            size, mine = entry.dtype.size or 1, data[: min(entry.end - at, MOST_IN_BLOCK)]
            yield number, len(mine) // size, encode(mine, size)
            at, data = at + len(mine), data[len(mine) :]

    def _end_before(self, number: int) -> None:
        """Complete the tensors before this one."""
        while len(self._sizes) < number:
            rows, name = b"".join(self._rows), self._dense.entries[len(self._sizes)].name
            self._file.write(rows + END.pack(len(self._rows), _check(name, rows)))
            at = self._file.tell()
            self._sizes.append(at - self._begun)
            self._begun, self._rows = at, []

    def finish(self) -> Header:
        """Complete the file, whose header is returned. All bytes of the dense one must have come."""
        assert self._next == self._dense.file_size, "bytes of the dense file are missing"
        with naming(self._path):
            self._end_before(len(self._dense.entries))
            header = self._header(self._sizes, self._start)
            assert len(header.raw) == self._start, "the header does not fit in front of the data"
            self._file.seek(0)
            self._file.write(header.raw)
            self._file.flush()
        return header

    def _header(self, sizes: Iterable[int], length: int = 0) -> Header:
        entries = zip(self._dense.entries, sizes, strict=True)
        described = [(entry.name, DTYPES["U8"], [size]) for entry, size in entries]
        return make_header(described, self._metadata, self._where, length)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
    ) -> None:
        with suppress(*([OSError] if kind else [])):
            self._file.close()


Table = list[tuple[Entry, Block]]  # the dense tensor of each block


def read_table(path: Path, tensors: Iterable[tuple[Entry, Entry]]) -> Table:
    """The blocks of tensors, checked to be all of them; of each its dense entry and the stored one.

    Raises ValueError for a damaged file, OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        source = (file.fileno(), str(path))
        return [(e, block) for e, stored in tensors for block in _blocks(source, e, stored)]


def decoded(path: Path, table: Table, work: Callable[[Entry, int, memoryview], R]) -> Iterator[R]:
    """What `work` makes of each block: of the dense tensor, its first element and the dense bytes.

    It is called from several threads; what it returns comes in order. Raises as `read_table` does.
    """
    with open(path, "rb") as file:
        source = (file.fileno(), str(path))

        def make(item: tuple[Entry, Block]) -> R:
            entry, block = item
            frame, what = read_fully(source, block.size, block.at), f"{path}: {entry.name}"
            try:
                dense = decode(frame, block, entry.dtype.size or 1, what)
            except _C.BitsError as error:
                raise bits_error(what, error) from error
            return work(entry, block.first, memoryview(dense))

        yield from in_parallel(make, table)


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `work` makes of each item, in order, a few at a time in threads."""
    threads = _C.threads()
    pool, begun = ThreadPoolExecutor(threads), deque[Future[R]]()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode(data: memoryview, size: int) -> bytes:
    """A block of elements of `size` bytes as a frame, with zstd blocks of their own for bits and planes."""
    import zstandard

    content, bits = memoryview(_C.split(data, size)), (len(data) // size + 7) // 8
    plane = (len(content) - bits) // size
    ends = [0, bits, *(bits + plane * (j + 1) for j in range(size if plane else 0))]
    compressor = _spare(
        _compressors, lambda: zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    )
    stream, parts = compressor.compressobj(size=len(content)), []
    for begin, end in pairwise(ends):
        parts.append(stream.compress(content[begin:end]))
        parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(stream.flush())
    _compressors.append(compressor)
    return b"".join(parts)


def decode(frame: bytes, block: Block, size: int, what: str) -> bytearray:
    """The elements of a block: as many as its table says, whatever its frame says. what: for errors."""
    import zstandard

    what += f" must have an undamaged block at byte {block.at}"
    least = (block.elements + 7) // 8
    if int.from_bytes(frame[-4:], "little") != block.check:
        raise ValueError(f"{what}, got another in its place")
    decompressor = _spare(_decompressors, zstandard.ZstdDecompressor)
    try:
        told = zstandard.get_frame_parameters(frame)
        if not told.has_checksum or not least <= told.content_size <= least + block.elements * size:
            got = f"one of {told.content_size} bytes, or without a checksum"
            raise ValueError(f"{what}, got {got}")
        content = decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"{what}, got {error}") from error
    _decompressors.append(decompressor)
    out = bytearray(block.elements * size)
    _C.merge(content, size, out)
    return out


def _spare(those: list[T], make: Callable[[], T]) -> T:
    """One that no other thread uses."""
    try:
        return those.pop()
    except IndexError:
        return make()


def bits_error(what: str, error: _C.BitsError) -> ValueError:
    """What is wrong with a tensor's bits, in words."""
    _, required, got = error.args
    if required < 0:
        return ValueError(f"{what} must have zeros in the unused bits, got ones")
    return ValueError(f"{what} must have as many values as its bits say, {required}, got {got}")


def _blocks(source: tuple[int, str], entry: Entry, stored: Entry) -> list[Block]:
    """The blocks of a tensor, checked to be all of it."""
    what, size = f"{source[1]}: {entry.name}", entry.dtype.size or 1
    room = stored.nbytes - END.size
    if room < 0:
        refuse(what, "end with what tells its blocks", f"{stored.nbytes} bytes")
    rows, check = END.unpack(read_fully(source, END.size, stored.end - END.size))
    if rows * ROW.size > room:
        refuse(what, f"have {rows} blocks", f"{stored.nbytes} bytes")
    table = read_fully(source, rows * ROW.size, stored.end - END.size - rows * ROW.size)
    if check != _check(entry.name, table):
        refuse(what, "tell its own blocks", "a wrong checksum of them")
    blocks, at, first = [], stored.begin, 0
    for elements, length, checksum in ROW.iter_unpack(table):
        if not 0 < elements * size <= MOST_IN_BLOCK:
            refuse(what, f"have at most {MOST_IN_BLOCK} bytes in a block", elements * size)
        blocks.append(Block(at, length, checksum, first, elements))
        at, first = at + length, first + elements
    if at - stored.begin + len(table) != room:
        refuse(what, f"have {room - len(table)} bytes in blocks", at - stored.begin)
    if first * size != entry.nbytes:
        refuse(what, f"have {entry.nbytes // size} elements in blocks", first)
    return blocks


def _check(name: str, rows: bytes) -> int:
    return crc32(rows, crc32(name.encode()))
