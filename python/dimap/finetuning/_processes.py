"""The processes of a run: one, or several that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for training: gradients are averaged over all processes."""
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def sum(self, numbers: list[float]) -> list[float]:
        """Each number summed over all processes."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(n) for n in total]

    def average_buffers(self, model: nn.Module) -> None:
        """Running statistics (of batch norms) averaged over all processes."""
        for buffer in model.buffers():
            if self.world > 1 and buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join(device: str | None) -> Iterator[Processes]:
    """Join the processes of torchrun, or be the only one.

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
    if dist.is_available() and dist.is_initialized():
        yield Processes(torch.device(name), dist.get_rank(), dist.get_world_size())
        return
    found: dict[str, Any] = init_distributed_device_so(name)
    try:
        yield Processes(torch.device(found["device"]), found["global_rank"], found["world_size"])
    finally:
        if found["distributed"] and dist.is_initialized():
            dist.destroy_process_group()


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed all that is random for one epoch.

    Every epoch begins from its own number alone, so that a resumed run draws what one that was
    never interrupted does; and each process draws its own.
    """
    import random

    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def reduce_loss(total: Tensor, count: int, processes: Processes) -> float:
    """The mean loss of an epoch over all processes."""
    [loss, n] = processes.sum([float(total), float(count)])
    return loss / max(1.0, n)
