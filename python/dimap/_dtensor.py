"""Models whose parameters are spread over processes as DTensors (FSDP2, tensor parallelism).

No weight leaves its process. Each surveys its local shards, the tables are summed over the device
mesh, each solves the same, and each emits the masks of its shards. Of a shard that several processes
hold (`Replicate`) only the first of them counts; all of them get its mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import ops
from ._distributed import Group, Ranks, group_of

BINS = 4096
HEAD = 22  # columns of a table before its bins
CHUNK = 1 << 24  # weights that are looked at, or brought from a device, at a time
PROBES = 255  # places that are tried at once when the last kept tie is looked for

Positions = NDArray[np.int64]


@dataclass
class _Local:
    """What this process holds of one tensor: a box of it, which begins at `offset`."""

    name: str
    tensor: Tensor  # the whole: a DTensor, or a plain tensor that every rank has
    weights: Tensor
    offset: tuple[int, ...]
    counts: bool = False  # whether this rank counts for it

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offset, tuple(self.weights.shape)

    def chunks(self) -> Iterator[Tensor]:
        """The local weights, flat and on the CPU."""
        flat = self.weights.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            yield flat[start : start + CHUNK].cpu()

    def whole_index(self, index: Any) -> Any:
        """Flat indices in the whole tensor of flat indices in the local one; their order is kept."""
        if not self.weights.dim() or not self.weights.numel():
            return index
        places = np.unravel_index(index, self.weights.shape)
        moved = [p + o for p, o in zip(places, self.offset, strict=True)]
        return np.ravel_multi_index(moved, self.tensor.shape)

    def ties(self, key: int) -> Positions:
        """The flat indices in the whole tensor of the local weights of this magnitude."""
        value = float(np.uint32(key).view(np.float32))
        found = [np.zeros(0, np.int64)]
        for i, chunk in enumerate(self.chunks()):
            found.append(np.flatnonzero((chunk.abs().float() == value).numpy()) + i * CHUNK)
        local = np.concatenate(found)
        whole: Positions = np.asarray(self.whole_index(local), np.int64)
        return whole

    def dressed(self, mask: Tensor) -> Tensor:
        """A local mask as what the weights are."""
        mask = mask.reshape(self.weights.shape).to(self.weights.device)
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


def select_cuts(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    layers: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """`dimap.ops.select_cuts` on DTensors, with plain tensors that are the same on every rank.

    All processes of the mesh call it together (those of the default group, where there are several
    meshes). Returns masks with the placements of `tensors`, the same as of the gathered tensors.

    Raises ValueError for placements other than Shard and Replicate, RuntimeError for an error of
    another rank, and ConnectionError if one does not answer within its group's timeout.
    """
    with _ranks_of(tensors) as ranks:
        locals_ = [_local(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        _share_out(locals_, ranks)
        cuts, quota, thresholds = _cut(locals_, layers, modules, keep, ranks)
        shares = _share_ties(locals_, [cuts[i].tolist() for i in layers], modules, quota, ranks)
        masks = []
        kept = torch.zeros(len(keep), dtype=torch.int64)
        for i, local in enumerate(locals_):
            mask = _emit(local, cuts[layers[i] : layers[i] + 1], shares[i])
            if local.counts:
                kept[modules[i]] += mask.count_nonzero()
            masks.append(local.dressed(mask))
        if ranks.sum(kept).tolist() != list(keep):
            raise ValueError("the weights must not change while their masks are selected")
    return masks, thresholds


def apply_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """`dimap.ops.apply_` on the local shards."""
    ops.apply_([_to_local(t) for t in tensors], [_to_local(m) for m in masks])


def _to_local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _ranks_of(tensors: Sequence[Tensor]) -> Group:
    meshes: list[DeviceMesh] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor) and tensor.device_mesh not in meshes:
            meshes.append(tensor.device_mesh)
    if len(meshes) == 1:
        (mesh,) = meshes
        device = torch.device(mesh.device_type)
        return Group([mesh.get_group(d) for d in range(mesh.ndim)], device)
    assert dist.group.WORLD is not None
    return group_of(dist.group.WORLD)


# Who holds what


def _local(name: str, tensor: Tensor) -> _Local:
    weights = _to_local(tensor)
    if not isinstance(tensor, DTensor):
        return _Local(name, tensor, weights, (0,) * tensor.dim())
    offset, shape = _place(name, tensor)
    if shape != tuple(weights.shape):
        raise ValueError(
            f"{name} must be sharded in even parts as torch.chunk does, so that this rank has shape "
            f"{shape}, got {tuple(weights.shape)}"
        )
    return _Local(name, tensor, weights, offset)


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


def _share_out(locals_: Sequence[_Local], ranks: Ranks) -> None:
    """Let the first rank of those that hold a box count it, and see that all boxes are the whole."""
    holders = ranks.gather([(local.name, local.box) for local in locals_])
    for i, local in enumerate(locals_):
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


# The cuts


def _cut(
    locals_: Sequence[_Local],
    layers: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
    ranks: Ranks,
) -> tuple[Tensor, list[int], Tensor]:
    """`solve`, as often as it takes: cuts by layer, quotas and thresholds by module."""
    digits = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
    module_of, dtypes = [0] * (max(layers) + 1), [torch.bfloat16] * (max(layers) + 1)
    for local, layer, module in zip(locals_, layers, modules, strict=True):
        module_of[layer] = module
        dtype = local.weights.dtype
        if dtype not in digits:
            got = str(dtype).removeprefix("torch.")
            raise ValueError(f"{local.name} must be float32, bfloat16 or float16, got {got}")
        dtypes[layer] = max(dtypes[layer], dtype, key=digits.__getitem__)
    bins = BINS
    windows = ops.first_windows(dtypes, bins)
    cuts = torch.full((len(module_of), 2), -1)
    quota = torch.full((len(keep),), -1)
    thresholds = torch.full((len(keep),), float("nan"), dtype=torch.float64)
    while open_ := [m for m in range(len(keep)) if quota[m] < 0]:
        rows = [layer for layer, m in enumerate(module_of) if m in set(open_)]
        table = torch.zeros(len(rows), HEAD + 3 * bins, dtype=torch.int64)
        for local, layer in zip(locals_, layers, strict=True):
            if local.counts and layer in rows:
                table[rows.index(layer)] += _survey(local, windows[layer : layer + 1], bins)
        found = ops.solve(
            ranks.sum(table),
            windows[rows],
            [open_.index(module_of[layer]) for layer in rows],
            [keep[m] for m in open_],
        )
        cuts[rows], quota[open_], thresholds[open_], closer = found
        if torch.equal(closer, windows[rows]):
            bins *= 8
        windows[rows] = closer
    return cuts, quota.tolist(), thresholds


def _survey(local: _Local, window: Tensor, bins: int) -> Tensor:
    table = torch.zeros(1, HEAD + 3 * bins, dtype=torch.int64)
    for i, chunk in enumerate(local.chunks()):
        with _named(local, i * CHUNK):
            table += ops.survey([chunk], [0], window, bins)
    return table[0]


@contextmanager
def _named(local: _Local, start: int) -> Iterator[None]:
    """Name the parameter and the place in the whole of it in an operator's error."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"weights\[0\] (must be .*) at flat index (\d+)", str(error))
        if found is None:
            raise
        index = int(local.whole_index(start + int(found[2])))
        raise ValueError(f"{local.name} {found[1]} at flat index {index}") from error


# Ties: the first ones are kept, by tensor and by flat index in the whole


def _share_ties(
    locals_: Sequence[_Local],
    cuts: Sequence[Sequence[int]],
    modules: Sequence[int],
    quota: Sequence[int],
    ranks: Ranks,
) -> list[int]:
    """How many of the local ties of each tensor are kept."""
    here = [
        local.ties(tie) if tie >= 0 and quota[module] > 0 else np.zeros(0, np.int64)
        for local, (_, tie), module in zip(locals_, cuts, modules, strict=True)
    ]
    counted = [len(at) if x.counts else 0 for x, at in zip(locals_, here, strict=True)]
    totals = ranks.sum(torch.tensor(counted, dtype=torch.int64)).tolist()
    left = list(quota)
    shares, split = [], {}
    for i, module in enumerate(modules):
        if 0 < left[module] < totals[i]:
            split[i] = left[module]
        shares.append(len(here[i]) if totals[i] <= left[module] else 0)
        left[module] -= min(left[module], totals[i])
    ends = _find_ends({i: (here[i], locals_[i], wanted) for i, wanted in split.items()}, ranks)
    for i, end in ends.items():
        shares[i] = int(np.searchsorted(here[i], end))
    return shares


def _find_ends(split: dict[int, tuple[Positions, _Local, int]], ranks: Ranks) -> dict[int, int]:
    """The flat index before which lie as many ties of all ranks as are wanted, of each tensor."""
    low = np.zeros(len(split), np.int64)
    high = np.array([local.tensor.numel() for _, local, _ in split.values()], np.int64)
    wanted = np.array([count for _, _, count in split.values()], np.int64)
    # Before `low` there are not more than wanted, before `high` there are.
    steps = np.arange(1, PROBES + 1)
    while (high - low > 1).any():
        probes = low[:, None] + (high - low)[:, None] * steps // (PROBES + 1)
        mine = [
            np.searchsorted(at, row) if local.counts else np.zeros(PROBES, np.int64)
            for (at, local, _), row in zip(split.values(), probes, strict=True)
        ]
        before = ranks.sum(torch.from_numpy(np.stack(mine).astype(np.int64))).numpy()
        fits = before <= wanted[:, None]
        low = np.where(fits, probes, low[:, None]).max(axis=1)
        high = np.where(fits, high[:, None], probes).min(axis=1)
    return dict(zip(split, low.tolist(), strict=True))


def _emit(local: _Local, cut: Tensor, share: int) -> Tensor:
    """The local mask, flat and on the CPU."""
    quota = torch.tensor([share])
    masks = [torch.zeros(0, dtype=torch.bool)]
    for chunk in local.chunks():
        (mask,), quota = ops.emit([chunk], [0], [0], cut, quota)
        masks.append(mask)
    return torch.cat(masks)
