"""Which bytes of a checkpoint a process reads and writes, where several of them share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from ..distributed.ranks import Ranks
from ._header import Entry
from ._stream_io import Piece, Source, pieces_of


class Part:
    """The part of one of several ranks: neighbouring bytes, about as many as the others have.

    All files are laid end to end and cut into `size` equal stretches; a block of a tensor belongs to
    the stretch that it begins in. So a rank has whole shards, but for the first and the last of its
    part; and one file, or one tensor, is shared too.
    """

    def __init__(self, sources: Sequence[Source], ranks: Ranks) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        ends = [max((e.end for e in source.header.entries), default=0) for source in sources]
        *self._before, self._total = accumulate(ends, initial=0)

    def owns(self, file: int, begin: int) -> bool:
        """Whether what begins at this byte of a file is this rank's."""
        at = self._before[file] + begin
        return min(at * self.size // max(self._total, 1), self.size - 1) == self.rank

    def pieces(self, file: int, entries: Sequence[Entry]) -> Iterator[Piece]:
        """This rank's pieces of some tensors of a file."""
        return pieces_of(file, entries, lambda block: self.owns(file, block.begin))
