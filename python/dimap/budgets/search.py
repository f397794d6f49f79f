"""The smallest sparsity that meets budgets, and what the layers keep within their limits."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise

from ..groups import AUX
from ..groups.plan import Plan, Sparsity, share
from .asked import Budgets
from .costs import Cost
from .tables import ROUNDS, Tables, Weights

STEPS = 10**9  # a sparsity that is sought is a multiple of 1 / STEPS


@dataclass
class Solved:
    """What to prune, and how it came about.

    plan, keep: as they are given to an engine; with limits each layer is a scope of its own.
    thresholds: of the scopes that were asked for; None where an engine finds them.
    """

    plan: Plan
    keep: list[int]
    sparsity: dict[str, float]
    thresholds: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)


def solve(
    plan: Plan,
    sparsity: Sparsity,
    budgets: Budgets,
    costs: Sequence[Cost],
    weights: Callable[[], Weights],
) -> Solved:
    """The smallest sparsity that meets all budgets, and what the layers keep within their limits.

    sparsity: as in `dimap.select`; with budgets, those of some modules, or none, or "auto".
    weights: called where they must be surveyed. Raises ValueError where it cannot be done.
    """
    limits = budgets.of_layers(plan) if budgets.limited else None
    if not costs and not limits:
        return Solved(plan, plan.keep(sparsity), plan.ratios(sparsity))
    if costs and isinstance(sparsity, Mapping):
        sparsity = {name: share(f"sparsity[{name!r}]", x) for name, x in sparsity.items()}
    elif costs and sparsity not in (None, "auto"):
        raise ValueError(f"sparsity must be left to the budget of {costs[0].name}, got both")
    tables = None
    if limits or sparsity == "auto" or any(cost.part for cost in costs):
        tables = Tables(weights(), costs, limits)
    allowed = _allowed(plan, limits) if limits else None
    if not costs:
        given, keep = sparsity, plan.keep(sparsity)
        for name, count, (least, most) in zip(plan.scope_names, keep, allowed or (), strict=True):
            if not least <= count <= most:
                helps = "lower min_keep" if count < least else "raise max_keep"
                raise ValueError(
                    f"{name} must keep from {least} to {most} weights with these limits of its layers, "
                    f"got {count}, which are left at the sparsity asked for: {helps} or the sparsity"
                )
    else:
        given, keep = _search(plan, sparsity, costs, tables, allowed)
    if tables is None or limits is None:
        return Solved(plan, keep, plan.ratios(given))
    counts, thresholds = tables.settle(keep)
    apart = replace(
        plan,
        layers=tables.set_of,
        scopes=tables.set_of,
        scope_names=tables.names,
        scope_modules=[None] * len(tables.names),
    )
    named = {
        name: value if math.isfinite(value) else math.nan
        for name, value in zip(plan.scope_names, thresholds, strict=True)
    }
    least, most = (
        sum(count == limits[name][end] for name, count in zip(tables.names, counts, strict=True))
        for end in (0, 1)
    )
    told = {"the least that they may": least, "the most that they may": most}
    notes = [f"limits: {count} layers keep {which}" for which, count in told.items() if count]
    return Solved(apart, counts, plan.ratios(given), named, notes)


def _allowed(plan: Plan, limits: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """What each scope keeps at least and at most if its layers do."""
    scope_of = {
        layer.name: scope
        for (_, layer), scope in zip(plan.layer_of_tensors(), plan.scopes, strict=True)
    }
    found = [(0, 0)] * len(plan.scope_names)
    for name, (least, most) in limits.items():
        if name in scope_of:
            low, high = found[scope_of[name]]
            found[scope_of[name]] = low + least, high + most
    return found


def _search(
    plan: Plan,
    sparsity: Sparsity,
    costs: Sequence[Cost],
    tables: Tables | None,
    allowed: Sequence[tuple[int, int]] | None,
) -> tuple[float | Mapping[str, float], list[int]]:
    """The smallest sparsity that every cost fits, and what scopes keep then."""
    fixed = sparsity if isinstance(sparsity, Mapping) else {}
    names = [name for name in plan.modules if name != AUX]
    if odd := [name for name in fixed if name not in names]:
        raise ValueError(f"sparsity must be for the modules {', '.join(names)}, got {odd[0]}")

    def within(keep: list[int]) -> list[int]:
        ends = allowed or [(0, count) for count in keep]
        return [min(max(n, least), most) for n, (least, most) in zip(keep, ends, strict=True)]

    spread = _Spread(plan, fixed, costs, tables, within) if sparsity == "auto" and tables else None

    def given(step: int) -> float | Mapping[str, float]:
        share = step / STEPS
        if spread:
            return spread(share)
        return {name: fixed.get(name, share) for name in names} if fixed else share

    @cache
    def keeps(step: int) -> tuple[int, ...]:
        return tuple(within(plan.keep(given(step))))

    def fits(step: int, end: int) -> bool:
        keep = keeps(step)
        parts = tables.parts(keep, end) if tables else ()
        return all(cost.of(keep, parts) <= cost.most for cost in costs)

    low, sure = 0, STEPS
    for _ in range(ROUNDS):
        # Where the bounds meet the budget for certain, and where they may meet it.
        steps = range(low, sure)
        sure = low + bisect_left(steps, True, key=lambda step: fits(step, 1))
        maybe = low + bisect_left(range(low, sure), True, key=lambda step: fits(step, 0))
        if tables is None or keeps(sure) == keeps(maybe):
            break
        if not tables.close_in(keeps(sure), keeps(maybe)):
            break
        low = maybe
    if not fits(sure, 1):
        parts = tables.parts(keeps(sure), 1) if tables else ()
        for cost in costs:
            if (least := cost.of(keeps(sure), parts)) > cost.most:
                asked, got = (float(x / cost.unit) for x in (cost.most, Fraction(least)))
                raise ValueError(
                    f"{cost.name} must be at least {got:.6g}, which is left when all is pruned that "
                    f"may be, got {asked:.6g}"
                )
    return given(sure), list(keeps(sure))


class _Spread:
    """Sparsities of the modules, from the share of the cost that is dropped in all.

    The distortion of a module is the share of its energy that is removed. It is followed in steps of
    1 / GRID of the module's sparsity, along the convex curve below it; the steps of all modules are
    taken in order of the distortion that they add for each unit of cost.
    """

    GRID = 250

    def __init__(
        self,
        plan: Plan,
        fixed: Mapping[str, float],
        costs: Sequence[Cost],
        tables: Tables,
        within: Callable[[list[int]], list[int]],
    ) -> None:
        if None in plan.scope_modules:
            raise ValueError(
                "sparsity must be a number where a scope holds several modules, got auto"
            )
        self.fixed = fixed
        self.names = [name for name in plan.modules if name != AUX]
        weight = next(
            (c.weight for c in costs if c.part or c.name == "nominal_flops"), costs[0].weight
        )
        prices = [float(weight(head)) for head in tables.heads]
        module_of = [module for module, _ in plan.layer_of_tensors()]
        owners = [module_of[head] for head in tables.heads]
        energy = dict.fromkeys(self.names, 0.0)
        for owner, part in zip(owners, tables.energies(), strict=True):
            energy[owner] += part
        curves: dict[str, list[tuple[float, float, float]]] = {name: [] for name in self.names}
        for step in range(self.GRID + 1):
            share = step / self.GRID
            cost, lost = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, 0.0)
            found = tables.removed(within(plan.keep(share)))
            for owner, price, (dropped, removed) in zip(owners, prices, found, strict=True):
                cost[owner] += price * dropped
                lost[owner] += removed / (energy[owner] or 1.0)
            for name, curve in curves.items():
                curve.append((cost[name], lost[name], share))
        steps = []
        for name in self.names:
            hull = [] if name in fixed else _convex(curves[name])
            steps += [
                ((b[1] - a[1]) / (b[0] - a[0]), name, a[2], b[2], b[0] - a[0])
                for a, b in pairwise(hull)
            ]
        self.steps = sorted(
            steps, key=lambda step: step[0]
        )  # modules in order where they are equal
        self.ends = list(accumulate(step[4] for step in self.steps))

    def __call__(self, share: float) -> dict[str, float]:
        shares = dict.fromkeys(self.names, 0.0) | dict(self.fixed)
        left = share * self.ends[-1] if self.ends else 0.0
        for (_, name, first, last, cost), end in zip(self.steps, self.ends, strict=True):
            part = 1.0 if share == 1 or end <= left else max(0.0, (left - (end - cost)) / cost)
            if part > 0:
                shares[name] = first + part * (last - first) if part < 1 else last
        return shares


def _convex(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Those of the points (x, y, …), x rising, that lie on the convex curve below all of them."""
    hull: list[tuple[float, float, float]] = []
    for point in points:
        if hull and point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) >= (
            point[1] - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append(point)
    return hull
