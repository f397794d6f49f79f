"""Which sparsity meets a budget, and what limits leave to each layer: found from surveys, without pruning.

A survey's tables bound how many weights every layer keeps at any sparsity (`dimap._C.Counts`). So one
survey brackets the sparsity that a budget asks for, and further ones, through windows around the cuts,
close the bracket; all integers, the same wherever the weights lie.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _C
from .groups import AUX, whole, wholes
from .groups.plan import Plan, Sparsity
from .report.pruned import Pruned, count_dense

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import TypedDict

    class Wanted(TypedDict, total=False):
        """`Budgets` as arguments of a call."""

        flops: float | None
        nominal_flops: float | None
        params: float | None
        size: int | None
        min_keep: float
        max_keep: float
        limits: Mapping[str, tuple[float, float]]


STEPS = 10**9  # a sparsity that is sought is a multiple of 1 / STEPS
ROUNDS = 16  # surveys, far more than any weights need
TABLE_BYTES = 64 << 20  # all tables of a survey, about
# A first survey looks at magnitudes from 2^-24 to 2^8, as keys: the bits of the float32.
USUAL = (0x33800000, 0x437FFFFF)
ALL = (0, 0x7F7FFFFF)

# survey(tensor -> row, windows of the rows, bins) -> the rows, int64 (see `dimap.ops.survey`).
Survey: TypeAlias = "Callable[[Mapping[int, int], bytes, int], Any]"


@dataclass(frozen=True)
class Budgets:
    """What may be left of a model at most, and of each layer at least and at most.

    flops: the multiply-adds of nonzero weights times the tokens that meet them, as a share of the
        dense model's, (0, 1]; what is never pruned is part of both.
    nominal_flops: the same by the paper's count, in which all layers of a module have its density.
    params: the parameters that masks leave, as a share of all of the model's.
    size: bytes of the output's files of weights, which a bitmask format has to make smaller.
    min_keep, max_keep: the least and the most that a layer keeps, as shares of its weights.
    limits: the same for some layers, (least, most) by a pattern as in shells ("layers.0.*") for the names
        of layers, or by the name of a module; a later one goes before an earlier one.
    """

    flops: float | None = None
    nominal_flops: float | None = None
    params: float | None = None
    size: int | None = None
    min_keep: float = 0.0
    max_keep: float = 1.0
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @staticmethod
    def of(call: str, given: Mapping[str, Any]) -> Budgets:
        """What a call, by its name, was given. Raises TypeError for what is no budget."""
        known = [f.name for f in fields(Budgets)]
        if odd := [name for name in given if name not in known]:
            raise TypeError(f"{call}() got an unexpected keyword argument {odd[0]!r}")
        return Budgets(**given)

    def __post_init__(self) -> None:
        for name in ("flops", "nominal_flops", "params", "min_keep", "max_keep"):
            _check_share(name, getattr(self, name))
        size: object = self.size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"size must be a positive number of bytes, got {size!r}")
        for pattern, pair in self.limits.items():
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"limits[{pattern!r}] must be (least, most), got {pair!r}")
            for share in pair:
                _check_share(f"limits[{pattern!r}]", share)

    @property
    def asked(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        names = ("flops", "nominal_flops", "params", "size")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def __bool__(self) -> bool:
        return bool(self.asked) or self.limited

    def refuse(self, scope: str) -> None:
        """Rows, and groups of N:M, leave each layer what they leave. Raises ValueError."""
        if self:
            given = ", ".join(self.settings())
            what = "scope='row'" if scope == "row" else "nm"
            raise ValueError(f"{what} must be given without budgets and limits, got {given}")

    @property
    def limited(self) -> bool:
        """Whether there are limits."""
        return self.min_keep > 0 or self.max_keep < 1 or bool(self.limits)

    def settings(self) -> dict[str, Any]:
        """Those that say something, as values that JSON has."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["limits"] = {pattern: list(pair) for pattern, pair in self.limits.items()}
        return {f.name: found[f.name] for f in fields(self) if getattr(self, f.name) != f.default
                and found[f.name]}  # fmt: skip

    def of_layers(self, plan: Plan) -> dict[str, tuple[int, int]]:
        """The least and the most weights that each layer may keep, by its name."""
        shares: dict[str, tuple[float, float]] = {}
        found: set[str] = set()
        for module, layer in plan.prunable():
            shares[layer.name] = self.min_keep, self.max_keep
            for pattern, pair in self.limits.items():
                if pattern == module or fnmatchcase(layer.name, pattern):
                    shares[layer.name] = pair
                    found.add(pattern)
        if odd := [pattern for pattern in self.limits if pattern not in found]:
            names = [layer.name for _, layer in plan.prunable()]
            raise ValueError(
                f"limits must be for modules ({', '.join(n for n in plan.modules if n != AUX)}) or "
                f"layers as {names[0]} … {names[-1]}, got {odd[0]!r}, which matches none"
            )
        sizes = dict.fromkeys(shares, 0)
        for (_, layer), size in zip(plan.layer_of_tensors(), plan.sizes, strict=True):
            sizes[layer.name] += size
        limits = {}
        for name, (low, high) in shares.items():
            n = sizes[name]
            # Of the decimal numbers that were given: 0.07 of 100 weights are 7.
            least, most = math.ceil(Fraction(repr(low)) * n), math.floor(Fraction(repr(high)) * n)
            if least > most:
                raise ValueError(
                    f"{name} of {n} weights must keep at most as many as it can, got limits of at "
                    f"least {least} ({low:g}) and at most {most} ({high:g})"
                )
            limits[name] = least, most
        return limits


def _check_share(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:  # nor a NaN
        raise ValueError(f"{name} must be in [0, 1], got {value}")


# What things cost

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


# Which sparsity


@dataclass
class Weights:
    """What can be surveyed.

    zero_bits: of each tensor, the low zero bits of its keys: 0, 16 or 13. dense: whether a kept zero
        counts as another weight, since what is surveyed is not the weights.
    """

    plan: Plan
    zero_bits: Sequence[int]
    survey: Survey
    dense: bool = False


class Tables:
    """What surveys tell of the layers of a plan.

    costs: each of their parts is counted apart. limits: layer name -> weights that it keeps at least and
    at most. around: the magnitudes of the first survey, `USUAL` or `ALL`.
    """

    def __init__(
        self,
        weights: Weights,
        costs: Sequence[Cost] = (),
        limits: Mapping[str, tuple[int, int]] | None = None,
        around: tuple[int, int] = USUAL,
        bins: int = 4096,
    ) -> None:
        plan, self.weights = weights.plan, weights
        self.set_of: list[int] = []  # of each tensor
        self.part_of: list[int] = []
        self.heads: list[int] = []  # of each part, a tensor
        self.names: list[str] = []  # of each set: its layer
        totals: list[int] = []
        last: object = None
        for i, ((_, layer), size) in enumerate(
            zip(plan.layer_of_tensors(), plan.sizes, strict=True)
        ):
            if not self.names or self.names[-1] != layer.name:
                self.names.append(layer.name)
            here = (layer.name, *(cost.part(i) for cost in costs if cost.part))
            if here != last:
                self.heads.append(i)
                totals.append(0)
            last = here
            totals[-1] += size
            self.set_of.append(len(self.names) - 1)
            self.part_of.append(len(totals) - 1)
        layers = max(plan.layers) + 1
        modules, bits = [0] * layers, [16] * layers
        for number, scope, zero in zip(plan.layers, plan.scopes, weights.zero_bits, strict=True):
            modules[number], bits[number] = scope, min(bits[number], zero)
        layer_of = dict(zip(self.set_of, plan.layers, strict=True))
        sizes = [0] * len(self.names)
        for number, size in zip(self.set_of, plan.sizes, strict=True):
            sizes[number] += size
        most = limits or {name: (0, n) for name, n in zip(self.names, sizes, strict=True)}
        self._sizes = totals
        self.bins = max(256, min(bins, TABLE_BYTES // 24 // len(totals)))
        self._counts = _C.Counts(
            [(self.set_of[head], total) for head, total in zip(self.heads, totals, strict=True)],
            [(layer_of[i], *most[name]) for i, name in enumerate(self.names)],
            modules,
            bits,
            bins=self.bins,
            first=around[0],
            last=around[1],
        )
        self._look()

    def _look(self) -> None:
        numbers, windows = self._counts.windows()
        rows = {part: row for row, part in enumerate(numbers)}
        tensors = {i: rows[part] for i, part in enumerate(self.part_of) if part in rows}
        self._counts.take(self.weights.survey(tensors, windows, self.bins))

    def close_in(self, least: Sequence[int], most: Sequence[int]) -> bool:
        """Survey what the keeps between the two need. False where nothing more can be known."""
        closer = self._counts.close_in(least, most)
        if closer:
            self._look()
        return closer

    def parts(self, keep: Sequence[int], end: int) -> Parts:
        """What the parts keep at least (end 0) or at most (1)."""
        _, kept, nonzero, _ = self._counts.kept(keep)
        others = kept if self.weights.dense else nonzero
        return [
            (head, count[end], other[end])
            for head, count, other in zip(self.heads, kept, others, strict=True)
        ]

    def settle(self, keep: Sequence[int]) -> tuple[list[int], list[float]]:
        """Exactly what each layer keeps, and the thresholds of the scopes."""
        for _ in range(ROUNDS):
            layers, _, _, thresholds = self._counts.kept(keep)
            if all(least == most for least, most in layers):
                return [least for least, _ in layers], thresholds
            if not self.close_in(keep, keep):
                break
        raise RuntimeError("the weights must not change while they are surveyed")

    def removed(self, keep: Sequence[int]) -> list[tuple[int, float]]:
        """Of each part, how many weights are dropped and the sum of their squares, about."""
        _, kept, _, _ = self._counts.kept(keep)
        scopes = [self.weights.plan.scopes[head] for head in self.heads]
        sums = [[0, 0] for _ in keep]
        for scope, pair in zip(scopes, kept, strict=True):
            sums[scope] = [a + b for a, b in zip(sums[scope], pair, strict=True)]
        found = []
        for part, (scope, (least, most)) in enumerate(zip(scopes, kept, strict=True)):
            # Between the bounds as all parts of the scope together are.
            low, high = sums[scope]
            share = (keep[scope] - low) / (high - low) if high > low else 0.0
            dropped = self.sizes()[part] - least - round(share * (most - least))
            found.append((dropped, self.removed_from(part, dropped)))
        return found

    def removed_from(self, part: int, dropped: int) -> float:
        """The sum of the squares of so many of the smallest weights of a part, about."""
        counts, energies = self._curves[part]
        i = bisect_left(counts, dropped, 1)
        share = (dropped - counts[i - 1]) / max(counts[i] - counts[i - 1], 1)
        return energies[i - 1] + share * (energies[i] - energies[i - 1])

    def sizes(self) -> list[int]:
        """How many weights each part has."""
        return self._sizes

    def energies(self) -> list[float]:
        """The sum of the squares of each part, about."""
        return [energies[-1] for _, energies in self._curves]

    @cached_property
    def _curves(self) -> list[tuple[list[int], list[float]]]:
        """Of each part, from the smallest weights up: how many, and the sum of their squares."""
        curves = []
        for part in range(len(self.heads)):
            curve = self._counts.curve(part) or [(0, 0.0)]
            counts = [0, *accumulate(n for n, _ in curve)]
            curves.append((counts, [0.0, *accumulate(n * square for n, square in curve)]))
        return curves


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
    if costs and isinstance(sparsity, (int, float)):
        raise ValueError(f"sparsity must be left to the budget of {costs[0].name}, got both")
    tables = None
    if limits or sparsity == "auto" or any(cost.part for cost in costs):
        tables = Tables(weights(), costs, limits)
    allowed = _allowed(plan, limits) if limits else None
    if not costs:
        given, keep = sparsity, plan.keep(sparsity)
        for name, count, (least, most) in zip(plan.scope_names, keep, allowed or (), strict=True):
            if not least <= count <= most:
                raise ValueError(
                    f"{name} must keep from {least} to {most} weights with these limits of its layers, "
                    f"got {count}, which are left at the sparsity asked for"
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
    note = f"limits: {least} layers keep the least that they may, {most} the most"
    return Solved(apart, counts, plan.ratios(given), named, [note])


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
