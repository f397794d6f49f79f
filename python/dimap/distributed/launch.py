"""The ranks that a launcher started, or that are a process group. torch is loaded where there are several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from .ranks import Ranks

if TYPE_CHECKING:
    import torch.distributed as dist

    from .group import Group

TIMEOUT = 1800.0
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def group_of(group: dist.ProcessGroup | None = None) -> Group:
    """The ranks of a process group of torch; of the default one if none is given."""
    import torch
    import torch.distributed as dist

    from .group import Group

    group = group or dist.group.WORLD
    assert group is not None
    on_cpu = any(name in str(dist.get_backend(group)) for name in ("gloo", "mpi", "undefined"))
    return Group([group], "cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device()))


@contextmanager
def launched(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that torchrun, or another launcher that speaks as it does, started with this one.

    Alone where the environment says nothing, or of one process. They talk by gloo: weights that
    stream through files are on no GPU.

    A rank waits `TIMEOUT` seconds for another, or as many as DIMAP_RANK_TIMEOUT says.
    """
    if any(name not in environment for name in LAUNCHED) or int(environment["WORLD_SIZE"]) < 2:
        yield Ranks()
        return
    text = environment.get("DIMAP_RANK_TIMEOUT", str(TIMEOUT))
    try:
        most = timedelta(seconds=float(text))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"DIMAP_RANK_TIMEOUT must be seconds, got {text!r}") from error
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=most)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ConnectionError(f"the ranks must find each other, got: {reason}") from error
    try:
        with group_of() as ranks:
            ranks.silence = min(ranks.silence, most.total_seconds())
            yield ranks
    finally:
        # This ends the connections, and so the waiting of ranks that have not noticed an error yet.
        with suppress(RuntimeError):
            dist.destroy_process_group()
