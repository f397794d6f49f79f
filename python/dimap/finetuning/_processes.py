"""The processes of a run and their device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.ranks import Ranks, group_of


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, which train on `device`, each on its own."""

    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world(self) -> int:
        return self.ranks.size

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
        return [float(n) for n in self.ranks.sum(torch.tensor(numbers, dtype=torch.float64))]

    def average_buffers(self, model: nn.Module) -> None:
        """Running statistics (of batch norms) averaged over all processes."""
        for buffer in model.buffers():
            if self.world > 1 and buffer.is_floating_point():
                buffer.copy_(self.ranks.sum(buffer) / self.world)

    def wait(self) -> None:
        """Until all processes are here."""
        self.ranks.gather(None)


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
    joined = dist.is_available() and dist.is_initialized()
    place = torch.device(name if joined else init_distributed_device_so(name)["device"])
    try:
        if dist.is_available() and dist.is_initialized():
            assert dist.group.WORLD is not None
            # Not entered as a context: DistributedDataParallel has exchanges of its own, in which an
            # error could not be told; the launcher ends the others.
            yield Processes(place, group_of(dist.group.WORLD))
        else:
            yield Processes(place)
    finally:
        if not joined and dist.is_available() and dist.is_initialized():
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
