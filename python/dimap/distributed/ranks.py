"""Several processes that prune one checkpoint or one model: what they add up, exchange and fear.

Every exchange begins with a word from each rank whether it goes on. So an error in one rank ends
all of them, wherever they are, with that error; and a rank that is gone ends them by the timeout of
the group at the latest (gloo notices the end of a process at once).
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .._files import _remove_leftovers

TIMEOUT = 1800.0  # seconds that a rank waits for another; DIMAP_RANK_TIMEOUT says otherwise
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_SWEEPS = 20  # times that a killed rank's files are looked for, 0.1 s apart


class Ranks(Protocol):
    """The processes of which this one is `rank`. All call the same methods in the same order."""

    rank: int
    size: int

    def sum(self, table: Tensor) -> Tensor:
        """The sum of every rank's int64 tensor (a new one); the shapes are equal."""
        ...

    def exchange(self, numbers: memoryview) -> None:
        """Add the other ranks' int64 numbers to these, in place: what `dimap._C` is given."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the same order on each: that of the ranks."""
        ...

    def outputs(self, *paths: Path) -> None:
        """Say where rank 0 creates outputs: should it be killed, the others clean up."""
        ...

    def stopping_together(self) -> AbstractContextManager[None]:
        """A block whose error ends it in every rank before any of them undoes what is around it."""
        ...


class Alone:
    """One process has it all."""

    rank, size = 0, 1

    def sum(self, table: Tensor) -> Tensor:
        return table

    def exchange(self, numbers: memoryview) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def outputs(self, *paths: Path) -> None:
        pass

    def stopping_together(self) -> AbstractContextManager[None]:
        return nullcontext()


class Group:
    """The processes of a torch group (gloo or nccl), or of all dimensions of a device mesh.

    groups: one, or one for each dimension of a mesh: then an exchange goes through all of them.
    device: where the groups' backend wants its tensors.

    A context: an error inside it is told to the others, which raise RuntimeError with its message;
    where there is none, all leave it together. A rank that is gone raises ConnectionError, also in
    place of an error that cannot be told: what that rank removed may be the cause.
    """

    def __init__(
        self, groups: Sequence[dist.ProcessGroup], device: torch.device | str = "cpu"
    ) -> None:
        self.groups, self.device = list(groups), torch.device(device)
        self.rank, self.size = 0, 1
        for group in self.groups:
            self.rank += self.size * dist.get_rank(group)
            self.size *= dist.get_world_size(group)
        self._over = False
        self._outputs: list[Path] = []

    def sum(self, table: Tensor) -> Tensor:
        self._go_on()
        total = table.to(self.device, copy=True)
        for group in self.groups:
            self._wait(dist.all_reduce(total, group=group, async_op=True))
        return total.to(table.device)

    def exchange(self, numbers: memoryview) -> None:
        table = torch.frombuffer(numbers, dtype=torch.int64)
        table.copy_(self.sum(table))

    def gather(self, value: Any) -> list[Any]:
        data = pickle.dumps(value)
        return [pickle.loads(part) for part in self._gather(data, self._go_on(len(data)))]

    def outputs(self, *paths: Path) -> None:
        self._outputs += paths

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        # Rank 0 must not remove a temporary that others are about to open: they would stop with an
        # error of their own, that it is missing, and not with the one that counts.
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._go_on()
            elif isinstance(error, Exception):
                self._tell(error)
        except ConnectionError:
            self._sweep()
            raise
        if isinstance(error, ConnectionError):
            self._sweep()

    def _go_on(self, size: int = 0) -> int:
        """Begin an exchange: the largest `size` of all ranks, or the error of one that stopped."""
        if self._over:
            raise RuntimeError("an exchange between ranks must not follow one that failed")
        stopped, most = self._words(0, size)
        if stopped:
            self._over = True
            self._raise(self._told(b""))
        return most

    def _tell(self, error: Exception) -> None:
        """Tell the others, who are in an exchange or come to one, that this rank has an error.

        Does nothing where an exchange has failed before. Returns when all have stopped.
        """
        if self._over:
            return
        self._over = True
        try:
            self._words(1, 0)
            self._told(_sentence(error).encode())
        except ConnectionError as lost:
            raise ConnectionError(f"{lost}; this rank had stopped: {_sentence(error)}") from error

    def _words(self, stopped: int, size: int) -> tuple[int, int]:
        words = torch.tensor([stopped, size], device=self.device)
        for group in self.groups:
            self._wait(dist.all_reduce(words, dist.ReduceOp.MAX, group=group, async_op=True))
        first, second = words.tolist()
        return first, second

    def _told(self, message: bytes) -> list[bytes]:
        """The message of every rank, empty where it has no error."""
        _, most = self._words(1, len(message))
        return self._gather(message, most)

    def _raise(self, messages: Sequence[bytes]) -> None:
        rank, text = next((r, m) for r, m in enumerate(messages) if m)
        raise RuntimeError(f"rank {rank} of {self.size} stopped: {text.decode()}")

    def _gather(self, data: bytes, most: int) -> list[bytes]:
        """Every rank's bytes; `most` is the length of the longest."""
        row = bytearray(len(data).to_bytes(8, "little") + data + bytes(most - len(data)))
        rows = torch.frombuffer(row, dtype=torch.uint8).to(self.device).unsqueeze(0)
        for group in self.groups:
            parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
            self._wait(dist.all_gather(parts, rows, group=group, async_op=True))
            rows = torch.cat(parts)
        found = [bytes(memoryview(row.numpy())) for row in rows.cpu()]
        return [row[8 : 8 + int.from_bytes(row[:8], "little")] for row in found]

    def _wait(self, work: Any) -> None:
        """Wait as the group does, but let signals interrupt it."""
        pause = 1e-4
        try:
            while not work.is_completed():
                time.sleep(pause)
                pause = min(pause * 1.5, 0.02)
            work.wait()
        except RuntimeError as error:
            self._over = True
            reason = str(error).split("\n")[0]
            raise ConnectionError(
                f"all {self.size} ranks must answer in time, got none of another rank, which died "
                f"or hangs ({reason})"
            ) from error

    def _sweep(self) -> None:
        """Remove what a killed rank 0 left: its temporaries, and no others, are held by nobody."""
        if self.rank == 0:
            return
        for _ in range(_SWEEPS):
            for path in self._outputs:
                _remove_leftovers(path)
            time.sleep(0.1)  # the system takes a moment to end a process


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def group_of(group: dist.ProcessGroup) -> Group:
    """The ranks of a process group of torch."""
    on_cpu = any(name in str(dist.get_backend(group)) for name in ("gloo", "mpi", "undefined"))
    device = "cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device())
    return Group([group], device)


@contextmanager
def launched(environment: Mapping[str, str] = os.environ) -> Iterator[Alone | Group]:
    """The ranks that torchrun, or another launcher that speaks as it does, started with this one.

    Alone where the environment says nothing, or of one process. They talk by gloo: weights that
    stream through files are on no GPU.
    """
    if any(name not in environment for name in LAUNCHED) or int(environment["WORLD_SIZE"]) < 2:
        yield Alone()
        return
    text = environment.get("DIMAP_RANK_TIMEOUT", str(TIMEOUT))
    try:
        seconds = timedelta(seconds=float(text))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"DIMAP_RANK_TIMEOUT must be seconds, got {text!r}") from error
    try:
        dist.init_process_group("gloo", timeout=seconds)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ConnectionError(f"the ranks must find each other, got: {reason}") from error
    try:
        assert dist.group.WORLD is not None
        with group_of(dist.group.WORLD) as ranks:
            yield ranks
    finally:
        # This ends the connections, and so the waiting of ranks that have not noticed an error yet.
        with suppress(RuntimeError):
            dist.destroy_process_group()
