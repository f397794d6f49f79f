"""Checkpoints pruned in several processes: one that is killed costs its checkpoint alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for
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
    busy: dict[Future[Outcome], tuple[_Worker, Task]] = {}
    outcomes: list[Outcome] = []
    try:
        while True:
            for task in islice(tasks, len(idle)):
                worker = idle.pop()
                busy[worker.submit(job, task)] = worker, task
            yield from outcomes
            if not busy:
                return
            outcomes = []
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, task = busy.pop(future)
                outcomes.append(worker.outcome(future, task))
                idle.append(worker)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that prunes one checkpoint after the other, and another one once it was killed.

    It is an executor of its own: one whose process is killed gives up all that was submitted to it.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None

    def submit(self, job: Job, task: Task) -> Future[Outcome]:
        if self._executor is not None:
            try:
                return self._executor.submit(_prune, job, task)
            except BrokenProcessPool:  # its process was killed while it had nothing to do
                self._executor.shutdown()
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
        self._executor = ProcessPoolExecutor(1, spawn, _begin, (self._threads,))
        before = multiprocessing.active_children()
        with _ignoring_interrupts():  # this process ends the worker, not the terminal
            future = self._executor.submit(_prune, job, task)
        started = (p for p in multiprocessing.active_children() if p not in before)
        self._process = next(started, None)  # none if it has ended already
        return future

    def outcome(self, future: Future[Outcome], task: Task) -> Outcome:
        try:
            return future.result()
        except BrokenProcessPool:
            assert self._executor is not None
            self._executor.shutdown()  # the process has ended; now its exit code is there
            self._executor = None
        code = (self._process and self._process.exitcode) or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", as where memory runs out"
        item, _ = task
        return Outcome(item.source, item.name, "failed", error=f"its process {how}")

    def end(self) -> None:
        """End the process; it removes what it has begun."""
        if self._executor is not None:
            if self._process is not None:
                self._process.terminate()
            self._executor.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """Prepare a worker's process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    unwind_on_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _prune(job: Job, task: Task) -> Outcome:
    try:
        return prune_one(job, *task)
    except SystemExit as ended:  # by SIGTERM; the executor would send it and wait for more
        os._exit(int(ended.code or 0))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
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
