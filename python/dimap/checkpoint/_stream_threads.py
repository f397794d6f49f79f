"""Pieces of files done by several threads, each with a buffer of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ._stream_io import Buffer

_Item = TypeVar("_Item")


@dataclass
class _Failure:
    error: BaseException | None = None


def each(items: Sequence[_Item], body: Callable[[_Item, Buffer], None], workers: int = 0) -> None:
    """body(item, buffer) for every item, in several threads; the first error ends all of them.

    Each thread does one item at a time by itself: reading, computing and writing of different
    items overlap, and an item stays in its processor's cache.
    """
    threads_inside = torch.get_num_threads()
    count = min(workers or min(threads_inside, os.cpu_count() or 1) + 1, max(len(items), 1))
    stop, failure, lock = threading.Event(), _Failure(), threading.Lock()
    queue = iter(items)

    def work() -> None:
        buffer = Buffer()
        try:
            while not stop.is_set():
                with lock:
                    item = next(queue, None)
                if item is None:
                    return
                body(item, buffer)
        except BaseException as error:
            with lock:
                failure.error = failure.error or error
            stop.set()

    torch.set_num_threads(1)  # of threads that start now: each of ours is one of several
    threads = [threading.Thread(target=work, name="dimap-stream") for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C comes here, in the thread that waits
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(threads_inside)
    if failure.error is not None:
        raise failure.error
