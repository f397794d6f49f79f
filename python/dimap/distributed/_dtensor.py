"""Models whose parameters are spread over processes as DTensors (FSDP2, tensor parallelism).

No weight leaves its process. Each surveys its local shards, the tables are summed over the device
mesh, each solves the same, and each emits the masks of its shards. Of a shard that several processes
hold (`Replicate`) only the first of them counts; all of them get its mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import ops
from ._local import Local, Positions, local_of, local_part, share_out
from .ranks import Group, Ranks, group_of

BINS = 4096
HEAD = 22  # columns of a table before its bins
PROBES = 255  # places that are tried at once when the last kept tie is looked for


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
        held = [local_of(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        share_out(held, ranks)
        cuts, quota, thresholds = _cut(held, layers, modules, keep, ranks)
        shares = _share_ties(held, [cuts[i].tolist() for i in layers], modules, quota, ranks)
        masks = []
        kept = torch.zeros(len(keep), dtype=torch.int64)
        for i, local in enumerate(held):
            mask = _emit(local, cuts[layers[i] : layers[i] + 1], shares[i])
            if local.counts:
                kept[modules[i]] += mask.count_nonzero()
            masks.append(local.dressed(mask))
        if ranks.sum(kept).tolist() != list(keep):
            raise ValueError("the weights must not change while their masks are selected")
    return masks, thresholds


def apply_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """`dimap.ops.apply_` on the local shards."""
    ops.apply_([local_part(t) for t in tensors], [local_part(m) for m in masks])


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


# The cuts


def _cut(
    held: Sequence[Local],
    layers: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
    ranks: Ranks,
) -> tuple[Tensor, list[int], Tensor]:
    """`solve`, as often as it takes: cuts by layer, quotas and thresholds by module."""
    digits = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
    module_of, dtypes = [0] * (max(layers) + 1), [torch.bfloat16] * (max(layers) + 1)
    for local, layer, module in zip(held, layers, modules, strict=True):
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
        for local, layer in zip(held, layers, strict=True):
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


def _survey(local: Local, window: Tensor, bins: int) -> Tensor:
    table = torch.zeros(1, HEAD + 3 * bins, dtype=torch.int64)
    for start, chunk in local.chunks():
        with _named(local, start):
            table += ops.survey([chunk], [0], window, bins)
    return table[0]


@contextmanager
def _named(local: Local, start: int) -> Iterator[None]:
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
    held: Sequence[Local],
    cuts: Sequence[Sequence[int]],
    modules: Sequence[int],
    quota: Sequence[int],
    ranks: Ranks,
) -> list[int]:
    """How many of the local ties of each tensor are kept."""
    here = [
        local.ties(tie) if tie >= 0 and quota[module] > 0 else np.zeros(0, np.int64)
        for local, (_, tie), module in zip(held, cuts, modules, strict=True)
    ]
    counted = [len(at) if x.counts else 0 for x, at in zip(held, here, strict=True)]
    totals = ranks.sum(torch.tensor(counted, dtype=torch.int64)).tolist()
    left = list(quota)
    shares, split = [], {}
    for i, module in enumerate(modules):
        if 0 < left[module] < totals[i]:
            split[i] = left[module]
        shares.append(len(here[i]) if totals[i] <= left[module] else 0)
        left[module] -= min(left[module], totals[i])
    ends = _find_ends({i: (here[i], held[i], wanted) for i, wanted in split.items()}, ranks)
    for i, end in ends.items():
        shares[i] = int(np.searchsorted(here[i], end))
    return shares


def _find_ends(split: dict[int, tuple[Positions, Local, int]], ranks: Ranks) -> dict[int, int]:
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


def _emit(local: Local, cut: Tensor, share: int) -> Tensor:
    """The local mask, flat and on the CPU."""
    quota = torch.tensor([share])
    masks = [torch.zeros(0, dtype=torch.bool)]
    for _, chunk in local.chunks():
        (mask,), quota = ops.emit([chunk], [0], [0], cut, quota)
        masks.append(mask)
    return torch.cat(masks)
