"""What the caller says of the grouping: own patterns, a family, what to leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

from .._errors import near
from ..families import FAMILIES
from .layers import (
    AUX,
    Layer,
    Modules,
    Shape,
    Slice,
    aux_layer,
    claimed,
    compiled,
    kinds,
    prunable,
    whole,
)
from .roles import TRANSFORMER

Patterns: TypeAlias = "Mapping[str, str | Sequence[str | Sequence[str]]]"


@dataclass(frozen=True)
class Choice:
    """How to group, where it is not left to the known families.

    patterns, family, ignore: as in `find_modules`. Takes the place of `patterns` in every call.
    """

    patterns: Patterns | None = None
    family: str | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.patterns is not None and self.family is not None:
            raise ValueError(
                f"patterns or family must be given, not both, got family {self.family!r} beside "
                "patterns (--pattern, --family)"
            )
        known = [TRANSFORMER, *(family.name for family in FAMILIES)]
        if self.family is not None and self.family not in known:
            raise ValueError(
                f"family must be one of those that `dimap families` lists, or {TRANSFORMER}, "
                f"got {self.family!r}{near(str(self.family), known)}"
            )

    def __bool__(self) -> bool:
        return self != Choice()

    def ignored(self, shapes: Mapping[str, Shape]) -> set[str]:
        """The parameters whose names are matched by `ignore`."""
        return {name for regex in self._regexes() for name in shapes if regex.fullmatch(name)}

    def leave_out(self, modules: Modules, shapes: Mapping[str, Shape]) -> tuple[Modules, list[str]]:
        """Modules with the layers that `ignore` matches in "aux", and notes that say so.

        Raises ValueError where one of `ignore` matches nothing, or some slices of a tensor only.
        """
        if not self.ignore:
            return modules, []
        out, named = self.ignored(shapes), set[Layer]()
        ignored = frozenset(out)
        layers, notes = prunable(modules), []
        for regex in self._regexes():
            names = {name for name in shapes if regex.fullmatch(name)}
            named |= {x for x in layers if regex.fullmatch(x.name)}
            hit = [x for x in layers if regex.fullmatch(x.name) or names & claimed([x])]
            if not hit and not names:
                raise ValueError(
                    f"ignore (--ignore) must match the whole name of a layer or parameter, got none "
                    f"for {regex.pattern!r} among:\n{kinds(shapes)}"
                )
            out |= claimed(hit)
            told = f"{len(hit)} layers, {hit[0].name} the first" if hit else f"{len(names)} tensors"
            notes.append(f"ignored, thus never pruned, by {regex.pattern!r}: {told}")
        for x in layers:
            some = [p for p in x.parameters if isinstance(p, Slice) and p.parameter not in ignored]
            if some and x not in named and out & claimed([x]):
                raise ValueError(
                    "ignore (--ignore) must leave out all layers of a tensor that stacks them, or "
                    f"none, got some of {whole(some[0])}"
                )
        return set_aside(modules, shapes, out), notes

    def _regexes(self) -> list[re.Pattern[str]]:
        return [compiled("ignore (--ignore) must be", text) for text in self.ignore]


def set_aside(modules: Modules, shapes: Mapping[str, Shape], out: Set[str]) -> Modules:
    """Modules with the layers that have any of these parameters in "aux"."""
    left = {m: [x for x in found if not out & claimed([x])] for m, found in modules.items()}
    places = {p: x for x in prunable(modules) for p in claimed([x]) & out}
    aux = [aux_layer(name, x.stage, x.block, x.tower) for name, x in places.items()]
    order = {name: place for place, name in enumerate(shapes)}
    aux = sorted([*modules[AUX], *aux], key=lambda layer: order[layer.parameters[0]])
    return {**{m: found for m, found in left.items() if found}, AUX: aux}


def choose(
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> Choice:
    """The arguments of a call as one. Raises ValueError for what does not go together."""
    more = (ignore,) if isinstance(ignore, str) else tuple(ignore or ())
    if not all(isinstance(text, str) for text in more):
        raise TypeError(f"ignore must be a regex or a list of them, got {ignore!r}")
    if isinstance(patterns, Choice):
        if family is None and not more:
            return patterns
        return Choice(patterns.patterns, family or patterns.family, (*patterns.ignore, *more))
    return Choice(patterns, family, more)
