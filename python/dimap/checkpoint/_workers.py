"""Checkpoints pruned in several processes: one that is killed costs its checkpoint alone."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from .._support import clean_up_on_signals
from ._prune_many import Job, Outcome, Task, prune_one

SPAWN = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold


def prune_all(job: Job, tasks: Iterator[Task], jobs: int) -> Iterator[Outcome]:
    """Prune the checkpoints, `jobs` at a time; the outcomes come as they are done.

    A process has its share of this one's threads. With one job no process is started.
    """
    if jobs == 1:
        for task in tasks:
            yield prune_one(job, *task)
        return
    lock = threading.Lock()
    outcomes: queue.Queue[Outcome | BaseException | None] = queue.Queue()

    def drive(worker: _Worker) -> None:
        try:
            while True:
                with lock:
                    task = next(tasks, None)
                if task is None:
                    break
                outcomes.put(worker.run(task))
        except BaseException as error:
            outcomes.put(error)
        else:
            outcomes.put(None)

    workers = [_Worker(job, max(1, torch.get_num_threads() // jobs)) for _ in range(jobs)]
    threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in workers]
    try:
        with _ignoring_interrupts():  # a worker is stopped by this process, not by the terminal
            for worker in workers:
                worker.start()
        for thread in threads:
            thread.start()
        busy = jobs
        while busy:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                busy -= 1
            else:
                yield outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that prunes one checkpoint after the other."""

    def __init__(self, job: Job, threads: int) -> None:
        self._job, self._threads = job, threads
        self._process: Any = None
        self._stopped = False

    def start(self) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(
            target=_serve, args=(theirs, self._job, self._threads), daemon=True
        )
        self._process.start()
        theirs.close()  # so that its end is seen

    def run(self, task: Task) -> Outcome:
        if not self._process.is_alive() and not self._stopped:
            self.start()
        try:
            self._pipe.send(task)
            outcome: Outcome = self._pipe.recv()
            return outcome
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if code == -9:
                how += ", as where memory runs out"
            item = task[0]
            return Outcome(item.source, item.name, "failed", error=f"its process {how}")

    def stop(self) -> None:
        """End the process; it removes what it has begun."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _serve(pipe: Connection, job: Job, threads: int) -> None:
    clean_up_on_signals()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with suppress(EOFError, OSError):
            while True:
                pipe.send(prune_one(job, *pipe.recv()))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started in this block do not see Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
