"""Score, select and prune a whole model: names in, masks out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from ._library import WINDOW_COLUMNS
from .budgets import Budgets, Weights, costs_of, solve
from .distributed import check_whole, is_sharded
from .groups import (
    Choice,
    Model,
    Patterns,
    Slice,
    choose,
    named_tensors,
    part_of,
    part_shape,
    prunable,
)
from .groups.nm import LARGEST, NM
from .groups.plan import Normalize, Plan, Scope, Sparsity, check_choice, renamed
from .masks import save_masks
from .methods import METHODS
from .report import Pruned
from .rows import select_rows
from .saliency import Batches, Loss
from .sensitivity import Sensitivity, measure

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .budgets.asked import Wanted

__all__ = ["Normalize", "Pruning", "Scope", "prune", "score", "select"]


def score(
    model: Model,
    *,
    normalize: Normalize = "layer",
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Score every prunable weight of a model (Eq. 10 of the DIMAP paper).

    model: an nn.Module or a state dict; float32, bfloat16 or float16 weights on one device.
    normalize: where the squares are summed: over a layer (the paper), or over the layers of one
        module that stand in the same block, in the same stage, or all of them.
    patterns, family, ignore: see `find_modules`.

    Returns parameter name -> float32 tensor of the parameter's shape.
    """
    check_choice("normalize", normalize, ("layer", "block", "stage", "module"))
    plan = Plan.of(model, "module", normalize, choose(patterns, family, ignore))
    _check_dense(plan)
    check_whole(plan.tensors, "score")
    with renamed(plan.names):
        scores = ops.score(plan.tensors, plan.layers)
    return plan.merged(scores)


def select(
    model: Model,
    sparsity: Sparsity = None,
    *,
    nm: str | None = None,
    method: str = "dimap",
    scope: Scope | None = None,
    normalize: Normalize | None = None,
    saliency: Mapping[str, Tensor] | None = None,
    data: Batches | None = None,
    loss: Loss | None = None,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
    input_size: int | Sequence[int] | None = None,
    **budgets: Unpack[Wanted],
) -> dict[str, Tensor]:
    """Return the masks that prune a model, without changing it.

    sparsity: the share of weights to drop, in [0, 1]: one number, or one for each module by name, all of
        them; 0 keeps a module as it is, 1 keeps nothing of it.
    nm: "2:4", say: every layer keeps, of every 4 weights in turn along its input, the 2 of largest
        magnitude (or saliency), of equal ones those of the lower index; any N:M up to M = 16, with
        no sparsity, scope or normalize. "auto" (of 4) or "auto:M": the N of each layer is its share at
        this sparsity, as `select` without nm gives it, rounded such that the scope's total is met as
        nearly as it can be (`groups.nm.round_kept`). The input axis is that of `groups.nm.input_axes`;
        layers whose inputs are no multiple of M are left dense, with a note.
    method: a name of `dimap.methods.METHODS`, which says the saliency, and the scope and the
        normalisation where they are not given: "dimap", "lamp", "uniform", "global_magnitude",
        "taylor", "snip", "wanda".
    scope: where one threshold holds: "module" (the paper), "global" (one for the network: LAMP),
        "layer" (the same ratio in every layer: uniform magnitude; `normalize` changes nothing),
        "row" (the same of each output of a layer: a row of [out, in]; nor there),
        "type" (a module with FC1 and FC2 apart), "block" or "stage" (all modules of it together).
    normalize: where the squares are summed, within the scope: over "layer" (the paper), the
        module's part of a "block" or "stage", "module", or the whole "scope". The last ranks by plain
        magnitude. normalize="module" with scope="global" lets whole modules compete: sorted,
        normalised and cut together.
    saliency: parameter name -> tensor to rank by in place of the magnitudes, for every prunable
        parameter: its shape and device, float32, bfloat16 or float16, finite, not negative. Ranked
        as it is (normalize="scope") unless `normalize` is given: then by s²/S(s), as weights are.
        What it says of other parameters is left out.
    data, loss: batches and loss for the methods that need them, as in `dimap.saliency.taylor`.
    patterns, family, ignore: see `find_modules`.
    budgets: flops, nominal_flops, params, min_keep, max_keep and limits, as in `dimap.Budgets`. With one
        of the first three the smallest sparsity is found that meets it; `sparsity` then says nothing, or
        that of some modules, or "auto": then the modules have sparsities of their own, such that a
        weight more removed would add as much to the distortion of any of them (docs/guide.md).
        Limits move nothing from scope to scope: what they take from one layer the others get.
    input_size: for a budget of FLOPs, as in `dimap.flops.count_flops`.

    A model may be sharded: parameters that are DTensors (FSDP2). Then all processes of its mesh call
    this together, no weight is gathered, and the masks are DTensors with the same placements; the
    order in which ties are kept is that of the whole tensors. A saliency is placed as the weights are,
    or whole and the same on every rank; methods that need data are refused.

    Returns parameter name -> bool tensor, True where the weight is kept. In each scope of N weights
    exactly ``N - round(sparsity * N)`` are kept; ties go to the earlier parameter, then to the lower
    flat index. Parameters of "aux" are not in it.
    """
    choice = choose(patterns, family, ignore)
    given = saliency, data, loss, choice, Budgets.of("select", budgets), input_size
    return decide(model, sparsity, nm, method, scope, normalize, *given).masks


def prune(
    model: Model,
    sparsity: Sparsity = None,
    *,
    nm: str | None = None,
    method: str = "dimap",
    scope: Scope | None = None,
    normalize: Normalize | None = None,
    saliency: Mapping[str, Tensor] | None = None,
    data: Batches | None = None,
    loss: Loss | None = None,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
    input_size: int | Sequence[int] | None = None,
    **budgets: Unpack[Wanted],
) -> Pruning:
    """Prune a model in place: what `select` drops becomes zero. Arguments as in `select`.

    Nothing is changed when an error is raised.
    """
    choice = choose(patterns, family, ignore)
    given = saliency, data, loss, choice, Budgets.of("prune", budgets), input_size
    pruning = decide(model, sparsity, nm, method, scope, normalize, *given)
    zero(pruning)
    return pruning


def measure_sensitivity(
    model: Model,
    *,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> Sensitivity:
    """What each module and each layer loses if it alone is pruned, at all sparsities, without data.

    model: as in `prune`. patterns, family, ignore: see `find_modules`.
    """
    plan = Plan.of(model, "module", "layer", choose(patterns, family, ignore))
    _check_dense(plan)
    return measure(surveyed_tensors(plan, plan.tensors, plan.names))


def zero(pruning: Pruning) -> None:
    """Set to zero what the masks drop."""
    weights = [pruning.parameters[name].detach() for name in pruning.masks]
    with renamed(list(pruning.masks)):
        ops.apply_(weights, list(pruning.masks.values()))


def decide(
    model: Model,
    sparsity: Sparsity,
    nm: str | None,
    method: str,
    scope: Scope | None,
    normalize: Normalize | None,
    saliency: Mapping[str, Tensor] | None,
    data: Batches | None,
    loss: Loss | None,
    choice: Choice,
    budgets: Budgets,
    input_size: int | Sequence[int] | None,
    counted: nn.Module | None = None,
) -> Pruning:
    """The masks and cuts of a pruning; the model is as it was, all checked before data are read.

    counted: the model whose FLOPs a budget bounds, where `model` is a state dict.
    """
    check_choice("method", method, tuple(METHODS))
    chosen = METHODS[method]
    if chosen.needs_data:
        if saliency is not None:
            raise ValueError(
                f"method={method!r} computes a saliency of its own: leave saliency out"
            )
        if data is None:
            raise ValueError(f"method={method!r} needs data, batches (input, target), got none")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"method={method!r} needs an nn.Module, to have gradients, got {type(model).__name__}"
            )
    groups = NM.parse(nm)
    if groups is not None:
        groups.refuse(sparsity=sparsity, scope=scope, normalize=normalize)
    ratio = sparsity
    if groups is not None and groups.n is not None:  # in each layer the same
        scope, normalize, ratio = "layer", "layer", 1 - groups.n / groups.m
    scope = scope or chosen.scope
    # A saliency of the caller's own is an order already: it is normalised only on request.
    normalize = normalize or ("scope" if saliency is not None else chosen.normalize)
    if groups is not None or scope == "row":
        budgets.refuse(scope)
    plan = Plan.of(model, scope, normalize, choice, groups)
    _check_dense(plan)
    parameters = named_tensors(model)
    if data is not None:
        check_whole(parameters.values(), "data")
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    costs = costs_of(budgets, plan, shapes, counted or model, input_size)
    if not costs:
        plan.keep(ratio)  # a wrong one is told before data are read
    source, tensors, labels = "magnitude", plan.tensors, plan.names
    if chosen.saliency is not None:
        source, saliency = method, chosen.saliency(model, data, loss, patterns=choice)
    elif saliency is not None:
        source = "given"
    if saliency is not None:
        tensors, labels = plan.ranked(saliency), [f"saliency of {name}" for name in plan.names]
    sharded = is_sharded(plan.tensors)
    if sharded:
        from .distributed import _dtensor

        if saliency is not None:
            tensors = [_dtensor.placed(t, w) for t, w in zip(tensors, plan.tensors, strict=True)]
    surveyed = partial(surveyed_tensors, plan, tensors, labels, source != "magnitude")
    solved = solve(plan, ratio, budgets, costs, surveyed)
    thresholds: dict[str, float] = {}
    counts: dict[str, int] = {}
    if scope == "row":
        check_whole(plan.tensors, "scope='row'")
        shares = plan.of_rows(plan.ratios(ratio))
        each = zip(labels, tensors, plan.axes, shares, strict=True)
        masks = [select_rows(*given) for given in each]
    elif groups is None or groups.n is None:
        numbers = solved.plan.layers, solved.plan.scopes, solved.keep
        if sharded:
            masks, cuts = _dtensor.select_cuts(labels, tensors, *numbers, signed=saliency is None)
        else:
            with renamed(labels):
                masks, cuts = ops.select_cuts(tensors, *numbers)
        found = dict(zip(solved.plan.scope_names, cuts.tolist(), strict=True))
        thresholds = solved.thresholds or found
    if groups is not None:
        kept = [_count_kept(mask) for mask in masks] if groups.n is None else []
        counts, thresholds = plan.counts(kept), {}
        masks = _select_groups(plan, tensors, labels, plan.by_tensor(counts), saliency is None)
    return Pruning(
        modules=plan.modules,
        thresholds=thresholds,
        scope=scope,
        normalize=normalize,
        sparsity=solved.sparsity,
        saliency=source,
        nm={name: f"{n}:{groups.m}" for name, n in counts.items()} if groups else {},
        masks=plan.merged(masks),
        parameters=parameters,
        notes=[*plan.notes, *solved.notes],
        asked=budgets.settings(),
    )


def surveyed_tensors(
    plan: Plan, tensors: Sequence[Tensor], labels: Sequence[str], dense: bool = False
) -> Weights:
    """Tensors in the memory of this process, or of several, for budgets and limits."""
    known = [ops.DTYPES.get(tensor.dtype) for tensor in tensors]
    bits = [dtype.zero_bits if dtype else 0 for dtype in known]
    if is_sharded(tensors):
        from .distributed import _dtensor

        return Weights(plan, bits, _dtensor.surveyor(labels, tensors), dense)

    def survey(rows: Mapping[int, int], windows: bytes, bins: int) -> memoryview:
        weights = [tensors[i] for i in rows]
        views = torch.frombuffer(bytearray(windows), dtype=torch.int64).reshape(-1, WINDOW_COLUMNS)
        device = weights[0].device if weights else "cpu"
        with renamed([labels[i] for i in rows]):
            table = ops.survey(weights, list(rows.values()), views.to(device), bins)
        return table.cpu().numpy().data

    return Weights(plan, bits, survey, dense)


def _count_kept(mask: Tensor) -> int:
    """The weights that a mask keeps, of all ranks."""
    count: Any = mask.sum()
    return int(count.full_tensor() if is_sharded([count]) else count)


def _select_groups(
    plan: Plan,
    tensors: Sequence[Tensor],
    labels: Sequence[str],
    counts: Sequence[int],
    signed: bool,
) -> list[Tensor]:
    """The masks of the plan's groups, of which each tensor keeps so many."""
    assert plan.nm is not None
    together: dict[tuple[int, int], list[int]] = {}
    for i, each in enumerate(zip(counts, plan.axes, strict=True)):
        together.setdefault(each, []).append(i)
    masks: dict[int, Tensor] = {}
    for (n, axis), places in together.items():
        here, names = [tensors[i] for i in places], [labels[i] for i in places]
        if is_sharded(tensors):
            from .distributed import _dtensor

            found = _dtensor.select_nm(names, here, n, plan.nm.m, axis, signed=signed)
        else:
            with renamed(names):
                found = ops.select_nm(here, n, plan.nm.m, axis)
        masks |= zip(places, found, strict=True)
    return [masks[i] for i in range(len(tensors))]


@dataclass(kw_only=True, repr=False)
class Pruning(Pruned):
    """What was pruned in memory. Its counts are made when they are asked for.

    masks: parameter name -> bool tensor, True where the weight is kept.
    parameters: every parameter of the model, "aux" included: the model's own tensors.

    The rest as in `dimap.report.Pruned`.
    """

    masks: dict[str, Tensor]
    parameters: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        return shapes | {name: part_shape(shapes, name) for name in self._slices()}

    @property
    def kept(self) -> dict[str, int]:
        """How many weights of every pruned parameter the masks keep."""
        check_whole(self.masks.values(), "kept")
        kept = {name: int(mask.count_nonzero()) for name, mask in self.masks.items()}
        return kept | {n: int(part_of(self.masks, n).count_nonzero()) for n in self._slices()}

    @property
    def nonzero(self) -> dict[str, int]:
        """How many weights of every parameter are not zero now."""
        check_whole(self.parameters.values(), "nonzero")
        counts = {name: count_nonzero(p) for name, p in self.parameters.items()}
        return counts | {n: count_nonzero(part_of(self.parameters, n)) for n in self._slices()}

    @property
    def smallest(self) -> dict[str, float]:
        """The smallest kept magnitude of every pruned parameter of which anything is kept."""
        check_whole(self.parameters.values(), "smallest")
        found = {}
        for name in [*self.masks, *self._slices()]:
            weight, mask = (part_of(x, name).detach() for x in (self.parameters, self.masks))
            magnitude = torch.where(mask.to(weight.device), weight.abs(), math.inf)
            if magnitude.numel() and math.isfinite(least := float(magnitude.amin())):
                found[name] = least
        return found

    def _slices(self) -> list[str]:
        """The slices that are layers: they are listed beside their parameters."""
        return [p for x in prunable(self.modules) for p in x.parameters if isinstance(p, Slice)]

    def save_masks(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, one bit a weight (see `dimap.load_masks`)."""
        save_masks(self.masks, path, self.mask_metadata())


def count_nonzero(tensor: Tensor) -> int:
    """How many values of a tensor of any dtype and layout are not zero.

    Where two share a byte (float4) all of them count.
    """
    if tensor.dtype is torch.float4_e2m1fn_x2:
        return 2 * tensor.numel()
    tensor = _stored(tensor)
    # What torch cannot count.
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()
    elif tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        tensor = tensor.view(getattr(torch, f"int{8 * tensor.itemsize}"))
    return int(tensor.count_nonzero())


def has_nan(tensor: Tensor) -> bool:
    """Whether a value of a tensor of floats of any layout is a NaN."""
    return bool(_stored(tensor).float().isnan().any())


def _stored(tensor: Tensor) -> Tensor:
    """The values that a tensor of any layout stores."""
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout is torch.strided else tensor.values()


def most_in_groups(tensor: Tensor, axis: int) -> list[int]:
    """Of m = 0 … 16, the most values that are not zero in a group of m along an axis.

    m itself where the groups do not fit the axis, and for m below 2.
    """
    most = list(range(LARGEST + 1))
    if tensor.layout is torch.strided and tensor.numel() and not tensor.is_quantized:
        values = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no float8
        along = (values != 0).movedim(axis, -1)
        along = along.reshape(-1, along.shape[-1])
        fitting = [m for m in range(2, LARGEST + 1) if along.shape[-1] % m == 0]
        most = [0 if m in fitting else m for m in most]
        for rows in (along[:64], along):  # in most tensors the first rows have a full group
            for m in fitting:
                if most[m] < m:
                    groups = rows.unflatten(-1, (-1, m))
                    most[m] = int(groups.sum(-1, dtype=torch.uint8).amax())
    return most


def _check_dense(plan: Plan) -> None:
    for name, tensor in zip(plan.names, plan.tensors, strict=True):
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        if tensor.device.type not in ("cpu", "cuda"):
            kind = f"one on {tensor.device.type}"
        if kind != "strided":
            raise ValueError(f"{name} must be a dense tensor on the CPU or CUDA, got {kind}")
