"""What may be left of a model, and of each layer: as it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..groups import AUX
from ..groups.plan import Plan, share

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Budgets:
    """What may be left of a model at most, and of each layer at least and at most.

    Shares are numbers, or text as "60%".

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
            if getattr(self, name) is not None:
                object.__setattr__(self, name, share(name, getattr(self, name)))
        size: object = self.size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"size must be a positive number of bytes, got {size!r}")
        for pattern, pair in self.limits.items():
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"limits[{pattern!r}] must be (least, most), got {pair!r}")
        limits = {
            p: tuple(share(f"limits[{p!r}]", x) for x in pair) for p, pair in self.limits.items()
        }
        object.__setattr__(self, "limits", limits)

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
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given["limits"] = {pattern: list(pair) for pattern, pair in self.limits.items()}
        usual = {"min_keep": 0.0, "max_keep": 1.0, "limits": {}}
        return {name: value for name, value in given.items() if value != usual.get(name)}

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
