"""What one of several processes holds of a tensor, and whether it counts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import ops
from .ranks import Ranks

CHUNK = 1 << 24  # weights that are compared at a time, which takes some memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their numbers in `_C`

Positions = NDArray[np.int64]
NOWHERE: Positions = np.zeros(0, np.int64)


@dataclass
class Local:
    """What this process holds of one tensor: a box of it, which begins at `offset`."""

    name: str
    tensor: Tensor  # the whole: a DTensor, or a plain tensor that every rank has
    layer: int
    module: int
    weights: Tensor
    offset: tuple[int, ...]
    counts: bool = False  # whether this rank counts for it

    @property
    def dtype(self) -> int:
        return DTYPES.index(self.weights.dtype)

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offset, tuple(self.weights.shape)

    def whole_index(self, index: Any) -> Any:
        """Flat indices in the whole tensor of flat indices in the local one; their order is kept."""
        if not self.weights.dim() or not self.weights.numel():
            return index
        places = np.unravel_index(index, self.weights.shape)
        moved = [p + o for p, o in zip(places, self.offset, strict=True)]
        return np.ravel_multi_index(moved, self.tensor.shape)

    def non_finite(self, index: int, kind: str) -> ValueError:
        """The error for a local weight, by its place in the whole tensor."""
        whole = int(self.whole_index(index))
        return ValueError(f"{self.name} must be finite, got {kind} at flat index {whole}")

    def ties(self, key: int) -> Positions:
        """The flat indices in the whole tensor of the local weights of this magnitude; of -1 none."""
        if key < 0:
            return NOWHERE
        value = float(np.uint32(key).view(np.float32))
        found = [NOWHERE]
        for i, chunk in enumerate(self.weights.reshape(-1).split(CHUNK)):
            same = (chunk.abs().float() == value).nonzero().flatten()
            found.append(same.cpu().numpy() + i * CHUNK)
        return np.asarray(self.whole_index(np.concatenate(found)), np.int64)

    def emit(self, cut: tuple[int, int], share: int) -> Tensor:
        """The local mask, which keeps so many of the ties."""
        to = self.weights.device
        cuts, quota = torch.tensor([cut], device=to), torch.tensor([share], device=to)
        [mask], _ = ops.emit([self.weights], [0], [0], cuts, quota)
        return mask

    def dressed(self, mask: Tensor) -> Tensor:
        """A local mask as what the weights are."""
        whole = self.tensor
        if not isinstance(whole, DTensor):
            return mask
        return DTensor.from_local(
            mask,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def local_part(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def local_of(name: str, tensor: Tensor, layer: int, module: int) -> Local:
    weights = local_part(tensor)
    if weights.dtype not in DTYPES:
        got = str(weights.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {got}")
    offset, shape = (0,) * tensor.dim(), tuple(tensor.shape)
    if isinstance(tensor, DTensor):
        offset, shape = _place(name, tensor)
    if shape != tuple(weights.shape):
        raise ValueError(
            f"{name} must be sharded in even parts as torch.chunk does, so that this rank has shape "
            f"{shape}, got {tuple(weights.shape)}"
        )
    return Local(name, tensor, layer, module, weights, offset)


def _place(name: str, tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the local shard begins in the whole tensor, and its shape."""
    mesh, placements = tensor.device_mesh, tensor.placements
    at = mesh.get_coordinate()
    if at is None:
        raise ValueError(f"{name} must be on a mesh that this rank is in, got {mesh}")
    # A dimension of the tensor that several of the mesh share is cut by the first of them first;
    # but what FSDP2 does to a tensor that is sharded already it marks as strided: that comes last.
    plain, strided = [], []
    for d, placement in enumerate(placements):
        if isinstance(placement, Shard) and not hasattr(placement, "split_factor"):
            plain.append((d, placement.dim))
        elif type(placement).__name__ == "_StridedShard":
            strided.append((d, int(getattr(placement, "dim", -1)), placement))
        elif not isinstance(placement, Replicate):
            got = ", ".join(map(repr, placements))
            raise ValueError(f"{name} must be placed by Shard and Replicate only, got ({got})")
    order = list(plain)
    for d, dim, placement in strided:
        later = [mesh.size(e) for e, other in plain if e > d and other == dim]
        if len(strided) > 1 or getattr(placement, "split_factor", 0) != int(np.prod(later)):
            got = ", ".join(map(repr, placements))
            raise ValueError(f"{name} must not be interleaved over the ranks, got ({got})")
        order.append((d, dim))
    offset, shape = [0] * tensor.dim(), list(tensor.shape)
    for d, dim in order:
        step = -(-shape[dim] // mesh.size(d))
        start = min(at[d] * step, shape[dim])
        offset[dim] += start
        shape[dim] = min(step, shape[dim] - start)
    return tuple(offset), tuple(shape)


def share_out(held: Sequence[Local], ranks: Ranks) -> set[str]:
    """Let the first rank of those that hold a box count it, and see that all boxes are the whole.

    Returns the kinds of devices that weights are on, of all ranks: "cpu", "cuda".
    """
    kinds = {local.weights.device.type for local in held}
    told = ranks.gather(([(local.name, local.box) for local in held], kinds))
    holders = [boxes for boxes, _ in told]
    for i, local in enumerate(held):
        first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        for rank, boxes in enumerate(holders):
            name, box = boxes[i] if i < len(boxes) else ("nothing", ((), (0,)))
            if name != local.name:
                raise ValueError(
                    f"all ranks must have the same parameters, got {name} on rank {rank} for "
                    f"{local.name} on rank {ranks.rank}"
                )
            first.setdefault(box, rank)
        local.counts = first[local.box] == ranks.rank
        covered = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in first)
        if covered != local.tensor.numel():
            raise ValueError(
                f"{local.name} must be on the ranks without gap or overlap: {local.tensor.numel()} "
                f"weights, got {covered}"
            )
    return set().union(*(kinds for _, kinds in told))
