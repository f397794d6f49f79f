"""The engine on files, without torch, and how it was built. Typed by hand: see csrc/bindings/python_*.cpp.

Numbers of dtypes: 0 float32, 1 bfloat16, 2 float16. Offsets and lengths are bytes unless said
otherwise. All calls release the interpreter while they work, and Ctrl-C ends them.
"""

from collections.abc import Callable, Sequence

from typing_extensions import Buffer

__version__: str

# Adds other ranks' numbers in place: int64, native order. Every rank calls it equally often.
Exchange = Callable[[memoryview], None]
# step ("reading", "writing", …), bytes done of it, bytes in all.
Progress = Callable[[str, int, int], None]
# Takes bytes of an output: its number, where they lie in it, the bytes, which are there for this call alone.
Piece = Callable[[int, int, memoryview], None]

class NonFiniteError(ValueError):
    """A NaN or an infinity: args are (tensor, flat index, "nan", "inf" or "-inf")."""

class ChangedError(ValueError):
    """A file changed between two readings: args are (tensor,)."""

class BitsError(ValueError):
    """Bits that do not fit their values: args are (tensor, what was required, what was got)."""

def build_info() -> dict[str, object]: ...

class Pruning:
    """Weights in files that are pruned together, or one rank's part of them.

    files: open descriptor and path (for errors) of each. tensors: in the order in which ties are
    kept: (file, offset, weights, dtype, layer). modules: of each layer. keep: of each module, how
    many weights. rank, size, exchange: of several processes that see the same files each does a
    part, neighbouring bytes. patterns: instead of what modules keep, N:M of each tensor, or the same of
    its rows, (n, m, how many weights lie from one of a group to its next): then nothing is read to
    decide, there are no cuts and thresholds, and what is not finite is found in writing. norms: of each
    tensor float32 numbers and `inner`, or none: |w| of flat index i times number i // inner of them, or
    of those repeated, is ranked, as float32, in place of |w|.
    """

    def __init__(
        self,
        files: Sequence[tuple[int, str]],
        tensors: Sequence[tuple[int, int, int, int, int]],
        modules: Sequence[int],
        keep: Sequence[int],
        *,
        threads: int = 0,  # 0: as many as OMP_NUM_THREADS says, or as there are processors
        rank: int = 0,
        size: int = 1,
        exchange: Exchange | None = None,
        progress: Progress | None = None,
        aside: int = 1 << 25,  # numbers of 4 bytes that may be set aside
        patterns: Sequence[tuple[int, int, int]] = (),
        norms: Sequence[tuple[Buffer, int]] = (),
    ) -> None: ...
    def decide(self) -> None:
        """Find the cuts. Raises NonFiniteError, OSError."""
    # After decide(), the same on every rank:
    thresholds: list[float]  # [modules] smallest score64 kept; nan where nothing is
    cuts: list[tuple[int, int]]  # [layers] key from which weights are kept; of ties, or -1
    kept: list[int]  # [tensors] weights that the masks keep
    readings: int  # how often weights were read to find the cuts

    def count_packed(self) -> list[int]:
        """How many kept weights of each tensor have any bit set, on all ranks: nonzero ones, and -0.

        It comes before write() with places for bits: these follow from it.
        """
    def write(
        self,
        targets: Sequence[tuple[int, str]] | Piece,
        places: Sequence[tuple[int, int]],
        rest: Sequence[tuple[int, int, int, int, int, int, int]],
        *,
        masks: tuple[int, str, Sequence[int]] | None = None,
    ) -> list[int]:
        """Write this rank's part of the pruned files, which exist and have their headers and sizes.

        targets: a descriptor (read and write) and path for each of `files`; or what takes the bytes that
            would be written there, from any thread, about in their order.
        places: [tensors] (offset of its weights, -1), or (offset of its nonzero values, offset of
            its bits), in the target of its file.
        rest: what is copied as it is: (file, offset, elements, bytes of one, mask, offset in the
            target, most). mask: the bits of an element that make it nonzero if any is set; 0: all are.
            most: these bits of the largest that is no NaN; 0: none is.
        masks: descriptor, path, and for each tensor the offset of its mask, one bit a weight.

        Returns how many elements of each of `rest` are not zero, in this rank's part.
        Raises ChangedError, OSError.
        """
    # After write(), of this rank's part:
    nonzero: list[int]  # [tensors] kept weights that are not zero
    nan: list[bool]  # [rest] whether an element is a NaN
    smallest: list[float]  # [tensors] smallest kept |w| of this rank; nan: none

def decide_shards(
    tensors: Sequence[tuple[int, int, int, int]],
    totals: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
    *,
    exchange: Exchange,
    size: int,
) -> tuple[list[tuple[int, int]], list[int], list[float]]:
    """Cuts [layers], quotas and thresholds [modules] of weights in the memory of several ranks.

    tensors: the local ones: (address, weights, dtype, layer); every rank names every tensor, with 0 weights
    where it holds none or another rank counts them. size: how many ranks. totals: weights of each
    layer in all ranks together. A quota says how many of the weights that tie with the threshold are kept.
    """

def survey(
    files: Sequence[tuple[int, str]],
    tensors: Sequence[tuple[int, int, int, int, int]],
    windows: Buffer,
    bins: int,
    *,
    threads: int = 0,
    rank: int = 0,
    size: int = 1,
    exchange: Exchange | None = None,
    progress: Progress | None = None,
    norms: Sequence[tuple[Buffer, int]] = (),
) -> bytes:
    """`dimap.ops.survey` of weights in files, of all ranks: int64 [layers, 22 + 3 * bins] as bytes.

    files, tensors, rank, size, exchange, norms: as in `Pruning`. windows: int64 [layers, 7].
    """

class Counts:
    """How many weights of each part of a network a pruning keeps, for any `keep`, from surveys.

    parts: (set, weights) of each, in order of position; the parts of a set are neighbours. sets:
    (layer, least, most): how many weights of it are kept at least and at most. modules: of each
    layer. granularities: low zero bits of every key of a layer. first, last: the keys of the first windows.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, int]],
        sets: Sequence[tuple[int, int, int]],
        modules: Sequence[int],
        granularities: Sequence[int],
        *,
        bins: int,
        first: int,
        last: int,
    ) -> None: ...
    def windows(self) -> tuple[list[int], bytes]:
        """The parts to survey next, and the window of each: int64 [parts, 7] as bytes."""
    def take(self, rows: Buffer) -> None:
        """The table of these parts, as `survey` gives it."""
    def kept(
        self, keep: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], list[float]]:
        """What is kept if each module keeps so many weights: (at least, at most) of each set, of each
        part, and of the nonzero weights of each part; and the thresholds of the modules: nan where
        more surveys are needed, infinity where each set keeps its least.
        """
    def close_in(self, keep_least: Sequence[int], keep_most: Sequence[int]) -> bool:
        """Set the windows to where every keep between the two is decided. False: nothing is closer."""
    def curve(self, part: int) -> list[tuple[int, float]]:
        """From the smallest magnitudes up: weights of the part, and the mean of the squares of such."""

def count_nonzero(
    files: Sequence[tuple[int, str]],
    tensors: Sequence[tuple[int, int, int, int, int]],
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[int]:
    """Elements that are not zero: tensors are (file, offset, elements, bytes of one, mask) as in `rest`."""

def count_groups(
    files: Sequence[tuple[int, str]],
    tensors: Sequence[tuple[int, int, int, int, int, int, int]],
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[tuple[int, list[int]]]:
    """What N:M the tensors have: how many elements are not zero, and of m = 0 … 16 the most in a group of m.

    tensors: (file, offset, bytes of an element, mask as in `rest`, and the tensor as [outer, length,
    inner]), of which `length` is cut into groups. 0 bytes: one bit an element, and the offset is in
    bits. Where m does not divide the length, and for m below 2, the most is m.
    """

def expand(
    files: Sequence[tuple[int, str]],
    targets: Sequence[tuple[int, str]],
    tensors: Sequence[tuple[int, int, int, int, int, int, int, int]],
    rest: Sequence[tuple[int, int, int, int]],
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write dense files from bitmask files.

    tensors: (file, offset of values, values, file of bits, their offset, weights, bytes of one, offset
    in the target of the first file). rest: (file, offset, bytes, offset in the target).
    Raises BitsError, OSError.
    """

def pack_bits(mask: Buffer) -> bytes:
    """One bit for each byte of 0 or 1 (bool): bit i % 8 of byte i // 8."""

def threads() -> int:
    """How many threads work at a time, as OMP_NUM_THREADS or the processors say."""

def split(data: Buffer, size: int) -> bytes:
    """Elements of 1, 2, 4 or 8 bytes as bits and byte planes: the content of a block in docs/format.md."""

def merge(content: Buffer, size: int, out: Buffer) -> None:
    """Back; `out` has the elements' length. Raises BitsError, of tensor 0, where they do not fit."""
