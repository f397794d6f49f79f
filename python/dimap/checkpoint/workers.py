"""Checkpoints pruned in several processes: one that is killed costs its checkpoint alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from .._errors import unwind_on_signals
from .many import Job, Outcome, Task, prune_one


def prune_all(job: Job, tasks: Iterator[Task], jobs: int) -> Iterator[Outcome]:
    """Prune the checkpoints, `jobs` at a time; the outcomes come as they are done.

    A process has its share of this one's threads. With one job no process is started.
    """
    if jobs == 1:
        yield from (prune_one(job, *task) for task in tasks)
        return
    threads = max(1, _threads() // jobs)
    workers = [_Worker(threads) for _ in range(jobs)]
    idle = list(workers)
    busy: dict[Connection, _Worker] = {}
    try:
        while True:
            for task in islice(tasks, len(idle)):
                worker = idle.pop()
                busy[worker.begin(job, task)] = worker
            if not busy:
                return
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy.pop(connection)
                idle.append(worker)
                yield worker.outcome()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that prunes one checkpoint after the other, and another one once it was killed."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: BaseProcess | None = None

    def begin(self, job: Job, task: Task) -> Connection:
        """Prune a checkpoint; returns what can be waited for."""
        if self._process is None or not self._process.is_alive():
            spawn = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
            self._connection, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs, self._threads))
            with _ignoring_interrupts():  # this process ends the worker, not the terminal
                self._process.start()
            theirs.close()
        self._item = task[0]
        self._connection.send((job, *task))
        return self._connection

    def outcome(self) -> Outcome:
        """What became of the checkpoint."""
        assert self._process is not None
        with suppress(EOFError, ConnectionError):
            outcome: Outcome = self._connection.recv()
            return outcome
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", as where memory runs out"
        return Outcome(self._item.source, self._item.name, "failed", error=f"its process {how}")

    def end(self) -> None:
        """End the process; it removes what it has begun."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, threads: int) -> None:
    """Prune what comes through the connection, until there is no other end."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    unwind_on_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            connection.send(prune_one(*connection.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _threads() -> int:
    """How many threads this process may use."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdecimal() else os.cpu_count() or 1


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started in this block do not see Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
