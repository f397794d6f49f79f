"""The checkpoints of a command shared among the processes of torchrun.

Rank 0 finds the checkpoints and publishes their list, largest first. Every rank takes the next one
by counting up a number that all of them share, so that none is taken twice and none waits for
another; in the end rank 0 collects what became of them. All of it goes through the key-value store
that torchrun keeps, no process group is needed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..checkpoint._inputs import Item
from ..checkpoint._prune_many import Outcome

WAIT = 600.0  # seconds for rank 0 to find the checkpoints
BEAT = 5.0  # seconds between two signs of life of a rank
SILENCE = 120.0  # seconds without one after which a rank is taken for dead


class Ranks:
    """This process among others; alone where the environment tells of no others."""

    def __init__(self) -> None:
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", 1))
        self._lock = threading.Lock()
        self._store: Store | None = None
        if self.count > 1:
            found = rendezvous("env://", timeout=timedelta(seconds=WAIT))
            store, self.rank, self.count = next(iter(found))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"dimap prune {attempt}", store)
            threading.Thread(target=self._beat, args=(self._store,), daemon=True).start()

    def publish(self, items: Sequence[Item] | None) -> list[Item]:
        """The list of rank 0, which gives it; the others give None.

        None from rank 0 says that it has failed: the others raise RuntimeError.
        """
        if self._store is not None and self.rank == 0:
            self._set("items", None if items is None else [asdict(item) for item in items])
        if self.rank == 0:
            return list(items or [])
        found = self._wait_for("items", 0)
        if found is None:
            raise RuntimeError(f"rank {self.rank}: there is no work, since rank 0 has failed")
        return [Item(**item) for item in found]

    def own(self, items: Sequence[Item]) -> Iterator[Item]:
        """What of the published list this rank is to do, one after the other."""
        if self._store is None:
            yield from items
            return
        while True:
            with self._lock:
                index = self._store.add("taken", 1) - 1
            if index >= len(items):
                return
            yield items[index]

    def collect(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """All outcomes at rank 0, when the last rank is done; those of this rank elsewhere."""
        if self._store is None:
            return list(outcomes)
        self._set(f"outcomes {self.rank}", [asdict(outcome) for outcome in outcomes])
        if self.rank > 0:
            return list(outcomes)
        found = [x for r in range(self.count) for x in self._wait_for(f"outcomes {r}", r)]
        return [Outcome(**outcome) for outcome in found]

    def _set(self, key: str, value: Any) -> None:
        assert self._store is not None
        with self._lock:
            self._store.set(key, json.dumps(value))

    def _wait_for(self, key: str, rank: int) -> Any:
        """What a rank sets under a key. RuntimeError where it gives no sign of life any more.

        It asks again and again: a wait inside the store could not be interrupted.
        """
        assert self._store is not None
        beats, heard = -1, time.monotonic()
        while True:
            with self._lock:
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
                now = self._store.add(f"alive {rank}", 0)
            if now != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                raise RuntimeError(
                    f"rank {rank} must be alive, got no sign of it in {SILENCE:.0f} s"
                )
            time.sleep(0.1)

    def _beat(self, store: Store) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it rank 0
            while True:
                with self._lock:
                    store.add(f"alive {self.rank}", 1)
                time.sleep(BEAT)
