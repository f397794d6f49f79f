"""The processes that do one job together, of which this is one: the only one, unless `launch` finds more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of which this one is `rank`, of `size`. All call the same methods in the same order.

    `Ranks()` is this process alone; several are a `Group`.
    """

    rank, size = 0, 1

    def sum(self, table: Tensor) -> Tensor:
        """The sum of every rank's tensor, a new one where there are several; the shapes are equal."""
        return table

    def exchange(self, numbers: memoryview) -> None:
        """Add the other ranks' int64 numbers to these, in place: what `dimap._C` is given."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (pickled), in the order of the ranks."""
        return [value]

    def take(self, items: Sequence[T]) -> Iterator[T]:
        """Those of the items, the same on every rank, that no other takes: the next when one is done."""
        return iter(items)

    def outputs(self, *paths: Path) -> None:
        """Say where rank 0 creates outputs: should it be killed, the others remove what it left."""

    def stopping_together(self) -> AbstractContextManager[None]:
        """A block whose error ends it in every rank before any of them undoes what is around it."""
        return nullcontext()

    def apart(self) -> AbstractContextManager[None]:
        """A block, however long, in which each rank works by itself; they leave it together."""
        return nullcontext()
