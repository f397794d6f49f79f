"""Work of which each process of torchrun takes the next piece when it has done one.

It goes through the key-value store that torchrun keeps: no process group is needed, and none waits
for another but rank 0 at the end.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .ranks import launched_size

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

WAIT = 600.0  # seconds for all ranks to start
BEAT = 5.0  # seconds between two signs of life of a rank
SILENCE = 120.0  # seconds without one after which a rank is taken for dead


class WorkQueue:
    """Items that `size` processes share, of which this is `rank`; what is shared is pickled.

    store: torch.distributed's, that all of them see; None for one process.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, size: int = 1) -> None:
        self._store, self.rank, self.size = store, rank, size

    @classmethod
    def launched(cls) -> WorkQueue:
        """Of the processes that torchrun started with this one, if any."""
        if launched_size() < 2:
            return cls()
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        found, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=WAIT))))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"dimap {attempt}", found)
        threading.Thread(target=_beat, args=(store, rank), daemon=True).start()
        return cls(store, rank, size)

    def publish(self, items: Sequence[T] | None) -> list[T]:
        """The items of rank 0, which gives them; the others give None.

        None from rank 0 says that it has failed: the others raise RuntimeError.
        """
        if self.rank == 0:
            if self._store is not None:
                self._store.set("items", pickle.dumps(items))
            return list(items or [])
        found = self._wait_for("items", 0)
        if found is None:
            raise RuntimeError(f"rank {self.rank}: there is no work, since rank 0 has failed")
        return list(found)

    def own(self, items: Sequence[T]) -> Iterator[T]:
        """Those of the published items that this rank is to do, one after the other."""
        for index in range(len(items)):
            if self._store is not None:
                index = self._store.add("taken", 1) - 1  # no other rank gets the same number
            if index >= len(items):
                return
            yield items[index]

    def collect(self, results: Sequence[T]) -> list[T]:
        """At rank 0 the results of all ranks, when the last is done; elsewhere this rank's own."""
        if self._store is not None and self.rank > 0:
            self._store.set(f"results {self.rank}", pickle.dumps(results))
            return list(results)
        others = (self._wait_for(f"results {r}", r) for r in range(1, self.size))
        return [*results, *(result for found in others for result in found)]

    def _wait_for(self, key: str, rank: int) -> Any:
        """What a rank sets under a key. RuntimeError where it gives no sign of life any more.

        It asks again and again: a wait inside the store could not be interrupted.
        """
        assert self._store is not None
        beats, heard = -1, time.monotonic()
        while not self._store.check([key]):
            now = self._store.add(f"alive {rank}", 0)
            if now != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                raise RuntimeError(
                    f"rank {rank} must be alive, got no sign of it in {SILENCE:.0f} s"
                )
            time.sleep(0.1)
        return pickle.loads(self._store.get(key))


def _beat(store: Store, rank: int) -> None:
    with suppress(RuntimeError):  # the store is gone, and with it rank 0
        while True:
            store.add(f"alive {rank}", 1)
            time.sleep(BEAT)
