"""Models whose parameters are spread over processes as DTensors (FSDP2, tensor parallelism).

No weight leaves its process. Each surveys its local shards, the tables are summed over the device
mesh, each solves the same, and each emits the masks of its shards. Of a shard that several processes
hold (`Replicate`) only the first of them counts; all of them get its mask.

torch.ops.dimap.apply_ and prune_ take DTensors by the rules here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from .. import _C, ops
from .._errors import way_out
from .._library import WINDOW_COLUMNS
from .group import Group
from .launch import group_of
from .ranks import Ranks

CHUNK = 1 << 24  # weights that are compared at a time, which takes some memory


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
        return ops.DTYPES[self.weights.dtype].number

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offset, tuple(self.weights.shape)

    def whole_index(self, index: Tensor) -> Tensor:
        """Flat indices in the whole tensor of flat indices in the local one; their order is kept."""
        if not self.weights.dim() or not self.weights.numel():
            return index
        whole = torch.zeros_like(index)
        places = torch.unravel_index(index, self.weights.shape)
        for place, first, size in zip(places, self.offset, self.tensor.shape, strict=True):
            whole = whole * size + place + first
        return whole

    def non_finite(self, index: int, kind: str) -> ValueError:
        """The error for a local weight, by its place in the whole tensor."""
        whole = self.whole_index(torch.tensor(index)).item()
        problem = f"{self.name} must be finite, got {kind} at flat index {whole}"
        return ValueError(problem + way_out(problem))

    def check_positive(self) -> None:
        weights = self.weights.flatten()
        if bool((negative := weights < 0).any()):
            at = negative.int().argmax()
            got = f"{float(weights[at]):g} at flat index {int(self.whole_index(at))}"
            raise ValueError(f"{self.name} must not be negative, got {got}")

    def ties(self, key: int) -> Tensor:
        """The flat indices in the whole tensor of the local weights of this magnitude; of -1 none."""
        found = [torch.zeros(0, dtype=torch.int64, device=self.weights.device)]
        if key >= 0:
            value = torch.tensor(key, dtype=torch.int32).view(torch.float32).item()
            for i, chunk in enumerate(self.weights.reshape(-1).split(CHUNK)):
                found.append((chunk.abs().float() == value).nonzero().flatten() + i * CHUNK)
        return self.whole_index(torch.cat(found))

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
    if weights.dtype not in ops.DTYPES:
        got = str(weights.dtype).removeprefix("torch.")
        problem = f"{name} must be float32, bfloat16 or float16, got {got}"
        raise ValueError(problem + way_out(problem))
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
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} must be on a mesh that this rank is in, got {mesh}")
    got = ", ".join(map(repr, placements))
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{name} must be placed by Shard and Replicate only, got ({got})")
    offset, shape = [], []
    for dim, size in enumerate(tensor.shape):
        # What torch leaves here of the places along this dimension, without any exchange.
        places = torch.arange(size).reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
        along = [p if getattr(p, "dim", None) == dim else Replicate() for p in placements]
        here = distribute_tensor(places, mesh, along, src_data_rank=None).to_local().flatten()
        if (here.diff() != 1).any():
            raise ValueError(f"{name} must not be interleaved over the ranks, got ({got})")
        offset.append(int(here[0]) if len(here) else size)
        shape.append(len(here))
    return tuple(offset), tuple(shape)


def hold(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    ranks: Ranks,
    layers: Sequence[int] | None = None,
    modules: Sequence[int] | None = None,
    *,
    signed: bool = True,
) -> tuple[list[Local], set[str]]:
    """What this rank holds of each tensor, and the kinds of devices of all ranks: "cpu", "cuda".

    Of those that hold the same box the first rank counts it; all boxes together are the whole.
    signed: as in `select_cuts`.
    """
    alike = [0] * len(names)
    numbered = zip(names, tensors, layers or alike, modules or alike, strict=True)
    held = [local_of(*each) for each in numbered]
    for local in held if not signed else ():
        local.check_positive()
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
        covered = sum(prod(shape) for _, shape in first)
        if covered != local.tensor.numel():
            raise ValueError(
                f"{local.name} must be on the ranks without gap or overlap: {local.tensor.numel()} "
                f"weights, got {covered}"
            )
    return held, set().union(*(kinds for _, kinds in told))


# Masks of all

BINS = 1024  # of a survey
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
    *,
    signed: bool = True,
) -> tuple[list[Tensor], Tensor]:
    """`dimap.ops.select_cuts` on DTensors, with plain tensors that are the same on every rank.

    signed: whether a number may be negative, as those of a saliency may not.

    All processes of the mesh call it together (those of the default group, where there are several
    meshes). Returns masks with the placements of `tensors`, the same as of the gathered tensors.

    Raises ValueError for placements other than Shard and Replicate, RuntimeError for an error of
    another rank, and ConnectionError if one does not answer within its group's timeout.
    """
    with _ranks_of(tensors) as ranks:
        held, devices = hold(names, tensors, ranks, layers, modules, signed=signed)
        sizes, module_of = [0] * (max(layers) + 1), [0] * (max(layers) + 1)  # of each layer
        for local in held:
            sizes[local.layer] += local.tensor.numel()
            module_of[local.layer] = local.module
        decide = _decide_in_memory if devices == {"cpu"} else _decide_on_devices
        cuts, quota, thresholds = decide(held, sizes, module_of, keep, ranks)
        masks, kept = [], torch.zeros(len(keep), dtype=torch.int64)
        for local, share in zip(held, _share_ties(held, cuts, quota, ranks), strict=True):
            mask = local.emit(cuts[local.layer], share)
            if local.counts:
                kept[local.module] += int(mask.count_nonzero())
            masks.append(local.dressed(mask))
        if ranks.sum(kept).tolist() != list(keep):
            raise ValueError("the weights must not change while their masks are selected")
    return masks, torch.tensor(thresholds, dtype=torch.float64)


def select_nm(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    n: int,
    m: int,
    axis: int,
    *,
    signed: bool = True,
) -> list[Tensor]:
    """`dimap.ops.select_nm` on DTensors, of which each rank must hold whole groups. As `select_cuts`."""
    with _ranks_of(tensors) as ranks:
        held, _ = hold(names, tensors, ranks, signed=signed)
        for local in held:
            begin, size = local.offset[axis], local.weights.shape[axis]
            if begin % m or size % m:
                raise ValueError(
                    f"{local.name} must be sharded in whole groups of {m} along its input, got "
                    f"[{begin}, {begin + size}) on rank {ranks.rank}"
                )
        with _named(held):
            masks = ops.select_nm([local.weights for local in held], n, m, axis)
        ranks.gather(None)  # nobody goes on where another one failed
    return [local.dressed(mask) for local, mask in zip(held, masks, strict=True)]


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A mask, or another tensor for a weight, placed over the ranks as that is.

    A plain tensor is the same on every rank. Nothing is sent where it is placed so already, or is
    plain. For a `Partial` gradient, whose parts are added up, each rank has all of it.
    """
    if not isinstance(like, DTensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    placements = tuple(Replicate() if p.is_partial() else p for p in like.placements)
    if isinstance(tensor, DTensor) and tensor.device_mesh == like.device_mesh:
        if tensor.placements == placements:
            return tensor
        return tensor.redistribute(like.device_mesh, placements)
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.to(like.device)
    return distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None)


def local_pair(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank holds of a tensor, and the mask of that."""
    here, kept = local_part(tensor), local_part(placed(mask, tensor))
    if here.shape != kept.shape:
        raise ValueError(
            "a sharded tensor must be in even parts as torch.chunk makes them, so that this rank has "
            f"shape {tuple(kept.shape)}, got {tuple(here.shape)}"
        )
    return here, kept


def apply_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """`dimap.ops.apply_` where some are DTensors: each rank does its part."""
    pairs = [local_pair(*pair) for pair in zip(weights, masks, strict=True)]
    ops.apply_([weight for weight, _ in pairs], [mask for _, mask in pairs])


def prune_(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> None:
    """`dimap.ops.prune_` where some are DTensors: all ranks call it together."""
    names = [f"weights[{i}]" for i in range(len(weights))]
    apply_(weights, select_cuts(names, weights, layers, modules, keep)[0])


def nm_(weights: Sequence[Tensor], n: int, m: int, dim: int) -> None:
    """`dimap.ops.nm_` where some are DTensors: all ranks call it together."""
    names = [f"weights[{i}]" for i in range(len(weights))]
    apply_(weights, select_nm(names, weights, n, m, dim))


def _register(rule: Callable[..., None]) -> None:
    torch.library.register_torch_dispatch(
        f"dimap::{rule.__name__}", DTensor, lambda _, __, ___, args=(), ____=None: rule(*args)
    )


for _rule in (apply_, prune_, nm_):
    _register(_rule)


def _ranks_of(tensors: Sequence[Tensor]) -> Group:
    meshes: list[DeviceMesh] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor) and tensor.device_mesh not in meshes:
            meshes.append(tensor.device_mesh)
    if len(meshes) == 1:
        (mesh,) = meshes
        device = torch.device(mesh.device_type)
        return Group([mesh.get_group(d) for d in range(mesh.ndim)], device)
    return group_of()


# The cuts


def _decide_in_memory(
    held: Sequence[Local], sizes: list[int], module_of: list[int], keep: Sequence[int], ranks: Ranks
) -> Decided:
    """Of weights that are in the memory of the processes."""
    flat = [local.weights.contiguous() for local in held]  # alive while their addresses are in use
    tensors = [
        (w.data_ptr(), w.numel() if local.counts else 0, local.dtype, local.layer)
        for local, w in zip(held, flat, strict=True)
    ]
    try:
        return _C.decide_shards(
            tensors, sizes, module_of, keep, exchange=ranks.exchange, size=ranks.size
        )
    except _C.NonFiniteError as error:
        number, index, kind = error.args
        raise held[number].non_finite(index, kind) from error


def _decide_on_devices(
    held: Sequence[Local], sizes: list[int], module_of: list[int], keep: Sequence[int], ranks: Ranks
) -> Decided:
    """The same where some are on GPUs: these survey them, and the tables are added up there."""
    dtype_of: dict[int, torch.dtype] = {}  # of each layer, the one with the most digits
    for local in held:
        pair = dtype_of.get(local.layer, local.weights.dtype), local.weights.dtype
        dtype_of[local.layer] = min(pair, key=lambda dtype: ops.DTYPES[dtype].zero_bits)
    here = held[0].weights.device if held else torch.device("cpu")
    windows = ops.first_windows([dtype_of[layer] for layer in range(len(sizes))], BINS).to(here)
    quota = torch.tensor([-1])
    while (quota < 0).any():
        table = _survey(held, [local.layer for local in held], windows, BINS, ranks)
        cuts, quota, thresholds, windows = ops.solve(table, windows, module_of, keep)
    return [(first, tie) for first, tie in cuts.tolist()], quota.tolist(), thresholds.tolist()


def _survey(
    held: Sequence[Local], rows: Sequence[int], windows: Tensor, bins: int, ranks: Ranks
) -> Tensor:
    """`dimap.ops.survey` of the weights of all ranks. rows: of each tensor, its row of the table."""
    on: dict[torch.device, list[tuple[Local, int]]] = {}  # those that this rank surveys
    for local, row in zip(held, rows, strict=True):
        if local.counts:
            on.setdefault(local.weights.device, []).append((local, row))
    table = ops.survey([], [], windows, bins)
    for device, mine in on.items():
        weights, numbers = [local.weights for local, _ in mine], [row for _, row in mine]
        with _named([local for local, _ in mine]):
            table += ops.survey(weights, numbers, windows.to(device), bins).to(table.device)
    return ranks.sum(table)


def surveyor(
    names: Sequence[str], tensors: Sequence[Tensor]
) -> Callable[[Mapping[int, int], bytes, int], memoryview]:
    """A function that surveys the weights of all ranks (see `dimap.budgets`); all ranks call it."""

    def survey(rows: Mapping[int, int], windows: bytes, bins: int) -> memoryview:
        with _ranks_of(tensors) as ranks:
            held, _ = hold([names[i] for i in rows], [tensors[i] for i in rows], ranks)
            here = held[0].weights.device if held else torch.device("cpu")
            views = torch.frombuffer(bytearray(windows), dtype=torch.int64).reshape(
                -1, WINDOW_COLUMNS
            )
            table = _survey(held, list(rows.values()), views.to(here), bins, ranks)
            return table.cpu().numpy().data

    return survey


@contextmanager
def _named(held: Sequence[Local]) -> Iterator[None]:
    """Say of what is not finite where it is in the whole tensor."""
    try:
        yield
    except RuntimeError as error:
        told = re.search(
            r"weights\[(\d+)\] must be finite, got (\S+) at flat index (\d+)", str(error)
        )
        if told is None:
            raise
        raise held[int(told[1])].non_finite(int(told[3]), told[2]) from error


# Ties: the first ones are kept, by tensor and by flat index in the whole


def _share_ties(
    held: Sequence[Local], cuts: Sequence[tuple[int, int]], quota: Sequence[int], ranks: Ranks
) -> list[int]:
    """How many of the local ties of each tensor are kept."""
    here = [local.ties(cuts[local.layer][1] if quota[local.module] > 0 else -1) for local in held]
    counted = [len(at) if local.counts else 0 for local, at in zip(held, here, strict=True)]
    totals = ranks.sum(torch.tensor(counted, dtype=torch.int64)).tolist()
    left = list(quota)
    shares, split = [], {}
    for i, (local, at, total) in enumerate(zip(held, here, totals, strict=True)):
        if 0 < left[local.module] < total:
            split[i] = left[local.module]
        shares.append(len(at) if total <= left[local.module] else 0)
        left[local.module] -= min(left[local.module], total)
    ends = _find_ends([(held[i], here[i], wanted) for i, wanted in split.items()], ranks)
    for i, end in zip(split, ends, strict=True):
        shares[i] = int((here[i] < end).count_nonzero())
    return shares


def _find_ends(split: Sequence[tuple[Local, Tensor, int]], ranks: Ranks) -> list[int]:
    """The flat index before which lie as many ties of all ranks as are wanted, of each tensor."""
    low = torch.zeros(len(split), dtype=torch.int64)
    high = torch.tensor([local.tensor.numel() for local, _, _ in split], dtype=torch.int64)
    wanted = torch.tensor([count for _, _, count in split], dtype=torch.int64)[:, None]
    # Before `low` there are not more than wanted, before `high` there are.
    steps = torch.arange(1, PROBES + 1)
    while (high - low > 1).any():
        probes = low[:, None] + (high - low)[:, None] * steps // (PROBES + 1)
        mine = [
            torch.searchsorted(at, row.to(at.device)).cpu() * local.counts
            for (local, at, _), row in zip(split, probes, strict=True)
        ]
        fits = ranks.sum(torch.stack(mine)) <= wanted
        low = torch.where(fits, probes, low[:, None]).amax(dim=1)
        high = torch.where(fits, high[:, None], probes).amin(dim=1)
    return low.tolist()
