"""Several processes that prune one checkpoint or one model together.

Before anything is exchanged each rank says whether it goes on. So an error in one rank ends all of
them, wherever they are, with that error; and a rank that is gone ends them by the timeout of the
group at the latest (gloo notices the end of a process at once).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from .._errors import sentence
from .._files import remove_leftovers
from .ranks import Ranks, T

SILENCE = 180.0
_SWEEPS = 20  # times that a killed rank's files are looked for, 0.1 s apart


class Group(Ranks):
    """The processes of a torch group (gloo or nccl), or of all dimensions of a device mesh.

    groups: one, or one for each dimension of a mesh: then an exchange goes through all of them.
    device: where the groups' backend wants its tensors.
    silence: seconds after which a rank that gives no sign of life is taken for gone, while they work
        apart.

    A context: an error inside it reaches the others, which raise RuntimeError with its message;
    where there is none, all leave it together. A rank that is gone raises ConnectionError, also in
    place of an error that cannot be passed on: what that rank removed may be the cause.
    """

    def __init__(
        self, groups: Sequence[dist.ProcessGroup], device: torch.device | str = "cpu"
    ) -> None:
        self.groups, self.device = list(groups), torch.device(device)
        self.rank, self.size = 0, 1
        for group in self.groups:
            self.rank += self.size * dist.get_rank(group)
            self.size *= dist.get_world_size(group)
        self.silence = SILENCE
        self._over = False  # an exchange has failed: no other can follow
        self._outputs: list[Path] = []

    def sum(self, table: Tensor) -> Tensor:
        self._go_on()
        total = table.detach().to(self.device, copy=True)
        self._reduce(total, dist.ReduceOp.SUM)
        return total.to(table.device)

    def exchange(self, numbers: memoryview) -> None:
        if numbers.nbytes:
            table = torch.frombuffer(numbers, dtype=torch.int64)
            table.copy_(self.sum(table))

    def gather(self, value: Any) -> list[Any]:
        self._go_on()
        return self._gather(value)

    def take(self, items: Sequence[T]) -> Iterator[T]:
        # They count up a number in the store that all of them share.
        counter, store = self.gather(secrets.token_hex(8))[0], _get_default_store()
        numbers = (store.add(counter, 1) - 1 for _ in range(len(items) + 1))
        return (items[i] for i in takewhile(lambda i: i < len(items), numbers))

    @contextmanager
    def apart(self) -> Iterator[None]:
        # Every rank counts up a number of its own in the store, by a thread, so that one that is
        # stopped or gone differs from one that works for long.
        name, store = self.gather(secrets.token_hex(8))[0], _get_default_store()
        over = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the store ends with the program that has it
                while not over.wait(self.silence / 10):
                    store.add(f"{name}/{self.rank}", 1)

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            try:
                yield
            except Exception:
                self._outlast(name, store)
                raise
            self._outlast(name, store)
        finally:
            over.set()
            heart.join()

    def _outlast(self, name: str, store: Any) -> None:
        """Wait until every rank is here, as long as the others are alive."""
        here = f"{name}/here"
        store.add(here, 1)
        last = {rank: (0, time.monotonic()) for rank in range(self.size) if rank != self.rank}
        with self._answered():
            while store.add(here, 0) < self.size:
                now = time.monotonic()
                for rank, (count, since) in last.items():
                    beats = store.add(f"{name}/{rank}", 0)
                    if beats != count:
                        last[rank] = beats, now
                    elif now - since > self.silence:
                        raise RuntimeError(f"rank {rank} has been silent for {now - since:.0f} s")
                time.sleep(min(0.2, self.silence / 10))

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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
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

    def _go_on(self) -> None:
        """Begin an exchange; raises the error of a rank that has stopped."""
        if self._over:
            raise RuntimeError("an exchange between ranks must not follow one that failed")
        if self._any_stopped(False):
            self._over = True
            told = self._gather(None)
            rank, text = next((r, text) for r, text in enumerate(told) if text is not None)
            raise RuntimeError(f"rank {rank} of {self.size} stopped: {text}")

    def _tell(self, error: Exception) -> None:
        """Tell the others, who are in an exchange or come to one, that this rank has an error.

        Does nothing where an exchange has failed before. Returns when all have stopped.
        """
        if self._over:
            return
        self._over = True
        text = sentence(error)
        try:
            self._any_stopped(True)
            self._gather(text)
        except ConnectionError as lost:
            raise ConnectionError(f"{lost}; this rank had stopped: {text}") from error

    def _any_stopped(self, this: bool) -> bool:
        word = torch.tensor([int(this)], device=self.device)
        self._reduce(word, dist.ReduceOp.MAX)
        return bool(word.item())

    def _reduce(self, table: Tensor, operation: Any) -> None:
        """All-reduce in place. Waits as the groups do, but lets signals interrupt it."""
        for group in self.groups:
            with self._answered():
                work = dist.all_reduce(table, operation, group=group, async_op=True)
                pause = 1e-4
                while not work.is_completed():
                    time.sleep(pause)
                    pause = min(pause * 1.5, 0.02)
                work.wait()

    def _gather(self, value: Any) -> list[Any]:
        values = [value]
        for group in self.groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            with self._answered():
                dist.all_gather_object(parts, values, group=group)
            values = [each for part in parts for each in part]
        return values

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._over = True
            reason = str(error).split("\n")[0]
            raise ConnectionError(
                f"one of the {self.size} ranks does not answer: it died or hangs ({reason})"
            ) from error

    def _sweep(self) -> None:
        """Remove what a killed rank 0 left: its temporaries, and no others, are held by nobody."""
        if self.rank == 0:
            return
        for _ in range(_SWEEPS):
            for path in self._outputs:
                remove_leftovers(path)
            time.sleep(0.1)  # the system takes a moment to end a process
