"""Checkpoints pruned in several processes: one that is killed costs its checkpoint alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from .._errors import unwind_on_signals
from .inputs import Item
from .many import Job, Outcome, Task, prune_one


def prune_all(job: Job, tasks: Iterator[Task], jobs: int) -> Iterator[Outcome]:
    """Prune the checkpoints, `jobs` at a time; the outcomes come as they are done.

    A process has its share of this one's threads, and prunes one checkpoint after the other; where it was
    killed another one is started. With one job there is none.
    """
    if jobs == 1:
        yield from (prune_one(job, *task) for task in tasks)
        return
    threads = max(1, _threads() // jobs)
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, Item] = {}
    try:
        while True:
            for item, record in islice(tasks, jobs - len(busy)):
                idle = [c for c, p in processes.items() if c not in busy and p.is_alive()]
                connection = idle[0] if idle else _start(threads, processes)
                connection.send((job, item, record))
                busy[connection] = item
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                item = busy.pop(ready)
                try:
                    yield ready.recv()
                except (EOFError, ConnectionError):
                    yield _outcome_of_killed(item, processes[ready])
    finally:
        for process in processes.values():
            process.terminate()  # it removes what it has begun
        for process in processes.values():
            process.join()


def _start(threads: int, processes: dict[Connection, BaseProcess]) -> Connection:
    """Add a process; returns the connection to it."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, threads))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()  # it does not see Ctrl-C: this process ends it, not the terminal
    finally:
        signal.signal(signal.SIGINT, before)
    theirs.close()
    processes[ours] = process
    return ours


def _outcome_of_killed(item: Item, process: BaseProcess) -> Outcome:
    process.join()
    code = process.exitcode or 0
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        how += ", as where memory runs out"
    return Outcome(item.source, item.name, "failed", error=f"its process {how}")


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
