"""The processes of a run, their devices and their random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from ..distributed.launch import group_of
from ..distributed.ranks import Ranks


@contextmanager
def join(device: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes of torchrun, or be the only one; and the device of this process.

    device: "cuda", "cuda:1", "cpu", …; a GPU where there is one if not given.
    """
    from timm.utils.distributed import init_distributed_device_so

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, got {name!r}") from error
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is here, got {name} and torch sees no GPU")
    given = dist.is_available() and dist.is_initialized()  # the caller's group stays
    place = torch.device(name if given else init_distributed_device_so(name)["device"])
    joined = dist.is_available() and dist.is_initialized()
    # Not entered as a context: DistributedDataParallel has exchanges of its own, in which an error
    # could not be told; the launcher ends the others.
    try:
        yield group_of() if joined else Ranks(), place
    finally:
        if joined and not given:
            dist.destroy_process_group()


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed all that is random for one epoch.

    Every epoch begins from its own number alone, so that a resumed run draws what one that was
    never interrupted does; and each process draws its own.
    """
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
