"""What a pruned model costs, of what its scopes and tensors keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from ..groups import whole, wholes
from ..groups.plan import Plan
from ..report.pruned import Pruned, count_dense
from .asked import Budgets

if TYPE_CHECKING:
    from torch import Tensor, nn

Parts: TypeAlias = (
    "Sequence[tuple[int, int, int]]"  # a tensor of each; weights kept; of these not zero
)


@dataclass(frozen=True)
class Cost:
    """What is left of a model, which a budget bounds.

    most: what the budget allows. unit: what 1 of the budget is.
    of(keep, parts): what is left, from what scopes and parts keep; it grows with any of them.
    part: of each tensor, what tells its part from others, within which only the sum counts. None
        where `keep` says all.
    weight: of each tensor, what one of its weights costs, about.
    """

    name: str
    most: Fraction
    unit: int
    of: Callable[[Sequence[int], Parts], Fraction | int]
    part: Callable[[int], object] | None = None
    weight: Callable[[int], Fraction | int] = lambda tensor: 1


def params_cost(plan: Plan, share: float, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    """The parameters that masks leave. shapes: of all parameters."""
    layers = (x for found in plan.modules.values() for x in found)
    total = sum(
        math.prod(shapes[name]) for name in wholes([p for x in layers for p in x.parameters])
    )
    rest = total - sum(plan.sizes)
    return Cost("params", _of(share, total), total, lambda keep, parts: rest + sum(keep))


def flops_cost(plan: Plan, share: float, dense: Mapping[str, int], total: int) -> Cost:
    """Multiply-adds: nonzero weights times tokens.

    dense: of parameters and slices before pruning. total: of the whole model.
    """
    tokens: list[Fraction | int] = []
    for name, size in zip(plan.names, plan.sizes, strict=True):
        per = Fraction(dense[name], size or 1)
        tokens.append(int(per) if per.denominator == 1 else per)
    rest = total - sum(dense[name] for name in plan.names)

    def left(keep: Sequence[int], parts: Parts) -> Fraction | int:
        return rest + sum(tokens[tensor] * nonzero for tensor, _, nonzero in parts)

    each = tokens.__getitem__
    return Cost("flops", _of(share, total), total, left, each, each)


def nominal_cost(plan: Plan, share: float, dense: Mapping[str, int], total: int) -> Cost:
    """Multiply-adds of each layer before pruning, times the density of its module."""
    module_of = [module for module, _ in plan.layer_of_tensors()]
    sizes = dict.fromkeys(plan.modules, 0)
    for module, size in zip(module_of, plan.sizes, strict=True):
        sizes[module] += size
    layers = [(m, sum(dense[p] for p in layer.parameters)) for m, layer in plan.prunable()]
    rest = total - sum(flops for _, flops in layers)
    known = None not in plan.scope_modules

    def left(keep: Sequence[int], parts: Parts) -> int:
        kept = dict.fromkeys(plan.modules, 0)
        if known:
            for name, count in zip(plan.scope_modules, keep, strict=True):
                kept[str(name)] += count
        else:
            for tensor, count, _ in parts:
                kept[module_of[tensor]] += count
        # As the report does it.
        return rest + sum(
            round(flops * Fraction(kept[module], sizes[module])) if sizes[module] else flops
            for module, flops in layers
        )

    per = [Fraction(dense[n], size or 1) for n, size in zip(plan.names, plan.sizes, strict=True)]
    part = None if known else module_of.__getitem__
    return Cost("nominal_flops", _of(share, total), total, left, part, per.__getitem__)


def size_cost(plan: Plan, size: int, packed: Callable[[Mapping[str, int]], int]) -> Cost:
    """Bytes of files. packed: from how many values each pruned parameter has at most to the bytes."""

    def left(keep: Sequence[int], parts: Parts) -> int:
        values: dict[str, int] = {}
        for tensor, kept, _ in parts:
            name = whole(plan.names[tensor])
            values[name] = values.get(name, 0) + kept
        return packed(values)

    return Cost("size", Fraction(size), 1, left, lambda tensor: whole(plan.names[tensor]))


@dataclass(kw_only=True)
class _Planned(Pruned):
    """Modules and shapes, of which FLOPs are counted."""

    shapes: Mapping[str, tuple[int, ...]]


def costs_of(
    budgets: Budgets,
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module | Mapping[str, Tensor] | None,
    input_size: int | Sequence[int] | None = None,
    packed: Callable[[Mapping[str, int]], int] | None = None,
) -> list[Cost]:
    """What the budgets bound. shapes: of all parameters. model, input_size: as in `build_report`.

    packed: as in `size_cost`; None where there is no file that sparsity makes smaller.
    """
    costs = []
    if budgets.params is not None:
        costs.append(params_cost(plan, budgets.params, shapes))
    if budgets.flops is not None or budgets.nominal_flops is not None:
        how: dict[str, Any] = {"scope": "module", "normalize": "layer", "thresholds": {}}
        planned = _Planned(modules=plan.modules, sparsity={}, shapes=shapes, **how)
        dense, flops, notes = count_dense(planned, model, input_size)
        if flops is None:
            raise ValueError(f"a budget of FLOPs needs the model's FLOPs, got {notes[0]}")
        total = flops.total
        for share, kind in ((budgets.flops, flops_cost), (budgets.nominal_flops, nominal_cost)):
            if share is not None:
                costs.append(kind(plan, share, dense, total))
    if budgets.size is not None:
        if packed is None:
            raise ValueError(
                "size is for a safetensors checkpoint written as bitmask (--format bitmask): no other "
                "file's size follows from its sparsity"
            )
        costs.append(size_cost(plan, budgets.size, packed))
    return costs


def _of(share: float, total: int) -> Fraction:
    return Fraction(repr(float(share))) * total
