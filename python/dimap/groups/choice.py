"""What the caller says of the grouping: own patterns, a family, what to leave out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..families import FAMILIES
from .layers import AUX, Layer, Modules, Shape, Slice, kinds, whole
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
            near = difflib.get_close_matches(str(self.family), known, n=3, cutoff=0.5)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(
                f"family must be one of those that `dimap families` lists, or {TRANSFORMER}, "
                f"got {self.family!r}{hint}"
            )

    def __bool__(self) -> bool:
        return self != Choice()

    def ignored(self, shapes: Mapping[str, Shape]) -> set[str]:
        """The parameters whose names are matched by `ignore`."""
        return {n for regex in self._regexes() for n in shapes if regex.fullmatch(n)}

    def leave_out(self, modules: Modules, shapes: Mapping[str, Shape]) -> tuple[Modules, list[str]]:
        """Modules with the layers that `ignore` matches in "aux", and notes that say so.

        Raises ValueError where one of `ignore` matches nothing, or some slices of a tensor only.
        """
        if not self.ignore:
            return modules, []
        names = self.ignored(shapes)
        out: dict[str, None] = {}  # parameters, each once
        layers = [layer for m, found in modules.items() if m != AUX for layer in found]
        notes = []
        for regex in self._regexes():
            hit = [x for x in layers if regex.fullmatch(x.name) or _within(x, names, regex)]
            others = [n for n in shapes if regex.fullmatch(n)]
            if not hit and not others:
                raise ValueError(
                    f"ignore (--ignore) must match the whole name of a layer or parameter, got none "
                    f"for {regex.pattern!r} among:\n{kinds(shapes)}"
                )
            out |= {whole(p): None for x in hit for p in x.parameters} | dict.fromkeys(others)
            told = (
                f"{len(hit)} layers, {hit[0].name} the first" if hit else f"{len(others)} tensors"
            )
            notes.append(f"ignored, thus never pruned, by {regex.pattern!r}: {told}")
        left = set_aside(modules, shapes, out)
        hidden = {x.name for x in layers}
        hidden -= {x.name for m, found in left.items() if m != AUX for x in found}
        for x in layers:
            matched = x.name in hidden and any(r.fullmatch(x.name) for r in self._regexes())
            sliced = [p for p in x.parameters if isinstance(p, Slice) and p.parameter not in names]
            if x.name in hidden and sliced and not matched:
                raise ValueError(
                    "ignore (--ignore) must leave out all layers of a tensor that stacks them, or "
                    f"none, got some of {whole(sliced[0])}"
                )
        return left, notes

    def _regexes(self) -> list[re.Pattern[str]]:
        found = []
        for text in self.ignore:
            try:
                found.append(re.compile(text))
            except re.error as error:
                got = f"{text!r}: {error}"
                raise ValueError(f"ignore (--ignore) must be valid regexes, got {got}") from error
        return found


def set_aside(modules: Modules, shapes: Mapping[str, Shape], out: Mapping[str, None]) -> Modules:
    """Modules with the layers that have any of these parameters in "aux"."""
    layers = [layer for m, found in modules.items() if m != AUX for layer in found]
    left: Modules = {}
    for module, found in modules.items():
        if module != AUX:
            left[module] = [x for x in found if not out.keys() & {*map(whole, x.parameters)}]
    places = {p: x for x in layers for p in map(whole, x.parameters)}
    order = {name: place for place, name in enumerate(shapes)}
    aux = [*modules[AUX], *(_aside(name, places[name]) for name in out if name in places)]
    aux.sort(key=lambda layer: order[layer.parameters[0]])
    return {**{m: found for m, found in left.items() if found}, AUX: aux}


def _within(layer: Layer, names: Iterable[str], regex: re.Pattern[str]) -> bool:
    return any(whole(p) in names and regex.fullmatch(whole(p)) for p in layer.parameters)


def _aside(name: str, layer: Layer) -> Layer:
    return Layer(name.removesuffix(".weight"), AUX, (name,), layer.stage, layer.block, layer.tower)


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
