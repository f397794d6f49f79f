"""The reader of `families`: names become layers by the tables of the families that they fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from ..families import BESIDE, WRAPPERS, Counts, Family
from .layers import (
    AUX,
    Found,
    Layer,
    Modules,
    Rule,
    Shape,
    assemble,
    by_module,
    kind_of,
    locate,
    natural,
    show,
    whole,
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
    found: list[Found]
    problems: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether it has a layer in every module."""
        return {f.layer.module for f in self.found} >= {row.module for row in self.family.rows}


def bare(name: str) -> str:
    """A name without the components that torch's wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class _Compiled(NamedTuple):
    rules: tuple[Rule, ...]
    block: re.Pattern[str]
    block_aux: re.Pattern[str] | None
    aux: re.Pattern[str] | None
    mark: re.Pattern[str] | None
    places: tuple[re.Pattern[str], ...]  # beginnings of names that tell block or stage


@cache
def _compiled(family: Family) -> _Compiled:
    block = rf"(?:{family.block})"
    rules = []
    for place, row in enumerate(family.rows):
        parts = tuple(re.compile(rf"{block}(?:{part})") for part in row.parts)
        rules.append(
            Rule(
                row.module,
                parts,
                row.name or row.module,
                row.ndims,
                place,
                row.optional,
                row.stacked,
            )
        )
    inside = "|".join(family.block_aux)
    outside = "|".join(family.aux)
    places = [block, family.stage] if family.stage else [block]
    return _Compiled(
        tuple(rules),
        re.compile(block),
        re.compile(rf"{block}(?:{inside})") if inside else None,
        re.compile(outside) if outside else None,
        re.compile(rf"{block}(?:{family.mark})") if family.mark else None,
        tuple(map(re.compile, places)),
    )


@cache
def _anywhere(family: Family) -> re.Pattern[str]:
    """The prefix of a prunable name, whatever it is."""
    parts = "|".join(re.sub(r"\?P<\w+>", "?:", part) for row in family.rows for part in row.parts)
    return re.compile(rf"{_PREFIX}(?:{family.block})(?:{parts})")


@cache
def _begins(family: Family) -> re.Pattern[str]:
    return re.compile(rf"{_PREFIX}(?:{family.block})")


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
    compiled = _compiled(family)
    inside = [
        (short[len(prefix) :], name)
        for short, name in names
        if short.startswith(prefix) and compiled.block.match(short, len(prefix))
    ]
    if compiled.mark and not any(compiled.mark.fullmatch(short) for short, _ in inside):
        return None
    found, problems = assemble(inside, shapes, compiled.rules, family.stages)
    tower = Tower(family, prefix, found, problems, {name for _, name in inside})
    claimed = {whole(p) for f in found for p in f.layer.parameters}
    blocks: dict[tuple[int | None, int | None], None] = {}  # an ordered set
    for short, name in inside:
        match = compiled.block.match(short)
        assert match is not None
        blocks[locate(match.groupdict(), name, family.stages)] = None
        if name in claimed or name in ignored or len(shapes[name]) < 2:
            continue
        if not (compiled.block_aux and compiled.block_aux.fullmatch(short)):
            problems.append(f"unknown weight {show(name, shapes[name])}")
    counts = Counter((f.layer.stage, f.layer.block, f.layer.module) for f in found)
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
    found: list[Found] = []
    modules: dict[str, None] = {}
    for tower in sorted(fit, key=lambda tower: natural(titles[tower.prefix])):
        title = titles[tower.prefix]
        head = f"{title}." if title else ""
        for f in tower.found:
            layer = f.layer
            moved = Layer(
                layer.name, head + layer.module, layer.parameters, layer.stage, layer.block, title
            )
            found.append(Found(moved, f.rule))
        here = {f.layer.module for f in tower.found}
        modules |= {head + row.module: None for row in tower.family.rows if row.module in here}
    claimed = {whole(p) for f in found for p in f.layer.parameters}
    longest = sorted(fit, key=lambda tower: -len(tower.prefix))
    aux, unknown = [], []
    for short, name in names:
        if name in claimed:
            continue
        stage = block = None
        title = ""
        for tower in longest:
            if not short.startswith(tower.prefix):
                continue
            rest = short[len(tower.prefix) :]
            patterns = _compiled(tower.family).places
            if match := next(filter(None, (pattern.match(rest) for pattern in patterns)), None):
                stage, block = locate(match.groupdict(), name, tower.family.stages)
                title = titles[tower.prefix]
                break
        aux.append(Layer(name.removesuffix(".weight"), AUX, (name,), stage, block, title))
        outside = block is None and len(shapes[name]) > 1
        if outside and not any(_expected(tower, short) for tower in fit):
            unknown.append(name)
    return by_module(found, modules, aux), unknown


def _expected(tower: Tower, short: str) -> bool:
    """Whether a name outside the blocks is one that the family has there."""
    pattern = _compiled(tower.family).aux
    if pattern is None:
        return False
    words = tower.prefix.split(".")[:-1]
    starts = (".".join(words[:n]) + "." if n else "" for n in range(len(words), -1, -1))
    return any(short.startswith(s) and pattern.fullmatch(short[len(s) :]) for s in starts)
