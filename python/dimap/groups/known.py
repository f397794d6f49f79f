"""The reader of `families`: names become layers by the tables of the families that they fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from ..families import BESIDE, WRAPPERS, Counts, Family, Row
from .layers import (
    Layer,
    Modules,
    Shape,
    assemble,
    aux_layer,
    by_module,
    claimed,
    kind_of,
    locate,
    natural,
    show,
)

Names = Sequence[tuple[str, str]]  # (bare, as the model has it)
_PREFIX = r"(?P<prefix>(?:[^.]+\.)*?)"
_BESIDE = re.compile("|".join(BESIDE))
# A number in front of blocks counts stages, of a family that has them, and no towers.
_STAGED = re.compile(
    r"(?:.*[._])?(?:layers?|stages?|levels?|blocks?|groups?|network|transformers|h)[._]?\d+\."
)


@dataclass
class Tower:
    """A row of blocks that is named as a family's.

    problems: where it differs from the family; none if it is of it.
    names: all that stand in its blocks.
    """

    family: Family
    prefix: str
    found: list[Layer]
    problems: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether it has a layer in every module."""
        return {layer.module for layer in self.found} >= {row.module for row in self.family.rows}


def bare(name: str) -> str:
    """A name without the components that torch's wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _pattern(*patterns: str, begin: str = "") -> re.Pattern[str]:
    """Any of the patterns behind this beginning. `re` remembers what it has compiled."""
    return re.compile(rf"(?:{begin})(?:{'|'.join(patterns)})")


@cache
def _rows(family: Family) -> tuple[Row, ...]:
    """The rows, with patterns of whole names behind a tower's prefix."""
    return tuple(
        replace(
            row,
            parts=tuple(rf"(?:{family.block})(?:{part})" for part in row.parts),
            name=row.name or row.module,
        )
        for row in family.rows
    )


@cache
def _begins(family: Family) -> re.Pattern[str]:
    return re.compile(rf"{_PREFIX}(?:{family.block})")


@cache
def _anywhere(family: Family) -> re.Pattern[str]:
    """The prefix of a prunable name, whatever it is."""
    parts = (re.sub(r"\?P<\w+>", "?:", part) for row in family.rows for part in row.parts)
    return _pattern(*parts, begin=_begins(family).pattern)


def towers(
    families: Iterable[Family],
    names: Names,
    shapes: Mapping[str, Shape],
    ignored: Collection[str] = (),
) -> list[Tower]:
    """All rows of blocks that have prunable names of one of the families, with their problems.

    ignored: what may be in a block though no family has it there.
    """
    matrices = [(short, name) for short, name in names if len(shapes[name]) > 1]
    examples: dict[str, list[str]] = {}  # names that differ in their numbers only
    for short, _ in matrices:
        group = examples.setdefault(kind_of(short), [])
        if len(group) < 3:
            group.append(short)
    found = []
    for family in families:
        kinds = [kind for kind, group in examples.items() if any(map(_begins(family).match, group))]
        kinds = [kind for kind in kinds if any(map(_anywhere(family).fullmatch, examples[kind]))]
        if not kinds:
            continue
        prefixes: dict[str, None] = {}
        for short, _ in matrices:
            if kind_of(short) in kinds and (match := _anywhere(family).fullmatch(short)):
                prefixes[match["prefix"]] = None
        for prefix in prefixes:
            if _STAGED.fullmatch(prefix):
                continue
            tower = _tower(family, prefix, names, shapes, ignored)
            if tower is not None:
                found.append(tower)
    return found


def _tower(
    family: Family,
    prefix: str,
    names: Names,
    shapes: Mapping[str, Shape],
    ignored: Collection[str],
) -> Tower | None:
    begin = re.compile(family.block)
    inside = [
        (short[len(prefix) :], name)
        for short, name in names
        if short.startswith(prefix) and begin.match(short, len(prefix))
    ]
    mark = _pattern(family.mark, begin=family.block)
    if family.mark and not any(mark.fullmatch(short) for short, _ in inside):
        return None
    found, problems, _ = assemble(inside, shapes, _rows(family), family.stages, in_order=True)
    tower = Tower(family, prefix, found, problems, {name for _, name in inside})
    known = claimed(found) | set(ignored)
    block_aux = _pattern(*family.block_aux, begin=family.block)
    blocks: dict[tuple[int | None, int | None], None] = {}  # an ordered set
    for short, name in inside:
        match = begin.match(short)
        assert match is not None
        blocks[locate(match.groupdict(), name, family.stages)] = None
        if name not in known and len(shapes[name]) > 1 and not block_aux.fullmatch(short):
            problems.append(f"unknown weight {show(name, shapes[name])}")
    counts = Counter((layer.stage, layer.block, layer.module) for layer in found)
    for stage, block in blocks:
        problems += _missing(family.per_block, counts, stage, block)
    return tower


def _missing(
    allowed: Sequence[Counts],
    counts: Mapping[tuple[int | None, int | None, str], int],
    stage: int | None,
    block: int | None,
) -> list[str]:
    """What a block has other than every one of `allowed` says; nothing if it is as one of them."""
    wrong = []
    for option in allowed:
        got = {module: counts.get((stage, block, module), 0) for module in option}
        odd = [m for m, n in option.items() if (got[m] != n if n is not None else not got[m])]
        if not odd:
            return []
        wrong.append((option, got, odd))
    where = f"block {block}" + ("" if stage is None else f" of stage {stage}")
    if len(wrong) == 1:
        option, got, odd = wrong[0]
        return [
            f"{where} must have {option[m] or 'one or more'} {m} layer(s), got {got[m]}"
            for m in odd
        ]
    options = " or ".join(
        ", ".join(f"{'some' if n is None else n} {m}" for m, n in option.items())
        for option in allowed
    )
    told = ", ".join(f"{n} {m}" for m, n in wrong[0][1].items())
    return [f"{where} must have layers of {options}, got {told}"]


def fitting(found: Sequence[Tower]) -> tuple[list[Tower], list[Tower]]:
    """The towers to prune, and those that are nearly of a family: no name is in two of them."""
    taken: set[str] = set()
    fit, near = [], []
    for tower in found:
        if not tower.problems and not taken & tower.names:
            fit.append(tower)
            taken |= tower.names
    for tower in sorted(found, key=lambda tower: len(tower.problems)):
        if tower.problems and tower.whole and not taken & tower.names:
            near.append(tower)
            taken |= tower.names
    ours = [tower for tower in fit if not beside(tower)]
    return ours or fit, [tower for tower in near if not (ours and beside(tower))]


def beside(tower: Tower) -> bool:
    """Whether it is part of what stands beside a backbone."""
    return bool(_BESIDE.fullmatch(f"{tower.prefix}layers.0."))


def tower_names(prefixes: Iterable[str]) -> dict[str, str]:
    """What each tower is called: the part of its prefix that tells it from the others.

    "" where there is one; {"vision_model.encoder.": "vision_model", "text_model.encoder.":
    "text_model"} where there are several.
    """
    split = {prefix: prefix.split(".")[:-1] for prefix in prefixes}
    if len(split) == 1:
        return dict.fromkeys(split, "")
    words = dict(split)
    for end in (-1, 0):
        while all(words.values()) and len({w[end] for w in words.values()}) == 1:
            words = {prefix: w[1:] if end == 0 else w[:-1] for prefix, w in words.items()}
    names = {prefix: ".".join(w or split[prefix]) or "model" for prefix, w in words.items()}
    if len(set(names.values())) < len(names):
        names = {prefix: prefix[:-1] or "model" for prefix in names}
    return names


def merge(
    fit: Sequence[Tower], names: Names, shapes: Mapping[str, Shape]
) -> tuple[Modules, list[str]]:
    """The modules of the towers, each tower's by themselves, and what is unknown outside of them."""
    titles = tower_names(tower.prefix for tower in fit)
    found: list[Layer] = []
    modules: dict[str, None] = {}
    for tower in sorted(fit, key=lambda tower: natural(titles[tower.prefix])):
        title = titles[tower.prefix]
        found += (layer.in_tower(title) for layer in tower.found)
        here = {layer.module for layer in tower.found}
        head = f"{title}." if title else ""
        modules |= {head + row.module: None for row in tower.family.rows if row.module in here}
    known = claimed(found)
    longest = sorted(fit, key=lambda tower: -len(tower.prefix))
    expected = [(_above(tower.prefix), _pattern(*tower.family.aux)) for tower in fit]
    aux, unknown = [], []
    for short, name in names:
        if name in known:
            continue
        place: tuple[int | None, int | None, str] = None, None, ""
        for tower in longest:
            family, rest = tower.family, short.removeprefix(tower.prefix)
            match = re.match(family.block, rest) or (family.stage and re.match(family.stage, rest))
            if match and short.startswith(tower.prefix):
                place = *locate(match.groupdict(), name, family.stages), titles[tower.prefix]
                break
        aux.append(aux_layer(name, *place))
        # Outside the blocks, and none of what the family has there.
        if place[1] is None and len(shapes[name]) > 1:
            behind = ((p, short[len(s) :]) for ss, p in expected for s in ss if short.startswith(s))
            if not any(pattern.fullmatch(rest) for pattern, rest in behind):
                unknown.append(name)
    return by_module(found, modules, aux), unknown


def _above(prefix: str) -> list[str]:
    """A tower's prefix, and the beginnings of what it stands in: "a.b." -> "a.b.", "a.", ""."""
    words = prefix.split(".")[:-1]
    return ["".join(f"{word}." for word in words[:n]) for n in range(len(words), -1, -1)]
