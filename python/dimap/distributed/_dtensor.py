"""Models whose parameters are spread over processes as DTensors (FSDP2, tensor parallelism).

No weight leaves its process. Each surveys its local shards, the tables are summed over the device
mesh, each solves the same, and each emits the masks of its shards. Of a shard that several processes
hold (`Replicate`) only the first of them counts; all of them get its mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import _C, ops
from ._local import Local, Positions, local_of, local_part, share_out
from .group import Group
from .ranks import Ranks, group_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their numbers in `_C`
ZERO_BITS = (0, 16, 13)  # low bits that are zero in every magnitude key of the dtype
PROBES = 255  # places that are tried at once when the last kept tie is looked for

# [layers] the key from which weights are kept, and the key of ties or -1; [modules] how many ties are
# kept; [modules] thresholds.
Decided = tuple[list[tuple[int, int]], list[int], list[float]]


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
        for local in held:
            if local.weights.dtype not in DTYPES:
                got = str(local.weights.dtype).removeprefix("torch.")
                raise ValueError(f"{local.name} must be float32, bfloat16 or float16, got {got}")
        devices = share_out(held, ranks)
        sizes, module_of = [0] * (max(layers) + 1), [0] * (max(layers) + 1)
        for local, layer, module in zip(held, layers, modules, strict=True):
            sizes[layer] += local.tensor.numel()
            module_of[layer] = module
        decide = _decide_in_memory if devices == {"cpu"} else _decide_on_devices
        cuts, quota, thresholds = decide(held, layers, sizes, module_of, keep, ranks)
        here = [cuts[layer] for layer in layers]
        shares = _share_ties(held, here, modules, quota, ranks)
        masks = _emit(held, here, shares)
        kept = torch.zeros(len(keep), dtype=torch.int64)
        for local, mask, module in zip(held, masks, modules, strict=True):
            if local.counts:
                kept[module] += int(mask.count_nonzero())
        if ranks.sum(kept).tolist() != list(keep):
            raise ValueError("the weights must not change while their masks are selected")
        dressed = [local.dressed(mask) for local, mask in zip(held, masks, strict=True)]
    return dressed, torch.tensor(thresholds, dtype=torch.float64)


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


def _decide_in_memory(
    held: Sequence[Local],
    layers: Sequence[int],
    sizes: Sequence[int],
    module_of: Sequence[int],
    keep: Sequence[int],
    ranks: Ranks,
) -> Decided:
    """Of weights that are in the memory of the processes; `sizes` are the weights of each layer."""
    flat = [local.weights.contiguous() for local in held]  # alive while their addresses are in use
    tensors = [
        (w.data_ptr(), w.numel() if local.counts else 0, DTYPES.index(w.dtype), layer)
        for local, w, layer in zip(held, flat, layers, strict=True)
    ]
    try:
        return _C.decide_shards(
            tensors, sizes, module_of, keep, exchange=ranks.exchange, size=ranks.size
        )
    except _C.NonFiniteError as error:
        number, index, kind = error.args
        raise held[number].non_finite(index, kind) from error


def _decide_on_devices(
    held: Sequence[Local],
    layers: Sequence[int],
    sizes: Sequence[int],
    module_of: Sequence[int],
    keep: Sequence[int],
    ranks: Ranks,
) -> Decided:
    """The same where some are on GPUs: these survey them, and the tables are added up there."""
    granularities = [max(ZERO_BITS)] * len(sizes)
    numbers: dict[torch.device, list[int]] = {}  # of the tensors that this rank surveys
    for i, (local, layer) in enumerate(zip(held, layers, strict=True)):
        zero_bits = ZERO_BITS[DTYPES.index(local.weights.dtype)]
        granularities[layer] = min(granularities[layer], zero_bits)
        if local.counts:
            numbers.setdefault(local.weights.device, []).append(i)

    def survey(windows: bytes, bins: int) -> memoryview:
        views = torch.frombuffer(bytearray(windows), dtype=torch.int64).reshape(-1, 7)
        table = ops.survey([], [], views, bins)
        for device, mine in numbers.items():
            weights = [held[i].weights for i in mine]
            try:
                found = ops.survey(weights, [layers[i] for i in mine], views.to(device), bins)
            except RuntimeError as error:
                told = re.search(
                    r"weights\[(\d+)\] must be finite, got (\w+) at .* (\d+)", str(error)
                )
                if told is None:
                    raise
                raise held[mine[int(told[1])]].non_finite(int(told[3]), told[2]) from error
            table = table.to(device) + found
        return ranks.sum(table).cpu().numpy().data

    return _C.decide_surveys(survey, granularities, sizes, module_of, keep)


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


def _emit(
    held: Sequence[Local], cuts: Sequence[tuple[int, int]], shares: Sequence[int]
) -> list[Tensor]:
    """The local masks, for each tensor's cut and its number of kept ties."""
    masks = []
    for local, cut, share in zip(held, cuts, shares, strict=True):
        to = local.weights.device
        (mask,), _ = ops.emit(
            [local.weights],
            [0],
            [0],
            torch.tensor([cut], device=to),
            torch.tensor([share], device=to),
        )
        masks.append(mask)
    return masks
