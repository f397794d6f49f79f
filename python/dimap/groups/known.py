"""The reader of `families`: names become layers by the table of the family that they fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import NamedTuple

from ..families import PREFIXES, WRAPPERS, Family
from .layers import AUX, Layer, Modules, Rule, Shape, assemble, by_module, locate, show


class Fit(NamedTuple):
    """Names grouped as a family's. problems: where they differ from it; none if they are of it."""

    family: Family
    modules: Modules
    problems: list[str]


def bare(name: str) -> str:
    """A name without the components that torch's wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class _Compiled(NamedTuple):
    rules: tuple[Rule, ...]
    aux: tuple[re.Pattern[str], ...]
    places: tuple[re.Pattern[str], ...]  # beginnings of names that tell block or stage


@cache
def _compiled(family: Family) -> _Compiled:
    chain = "|".join(map(re.escape, PREFIXES))
    prefix = rf"(?P<prefix>(?:(?:{chain})\.)*{family.prefix})"
    block = rf"{prefix}(?:{family.block})"
    rules = []
    for place, row in enumerate(family.rows):
        parts = tuple(re.compile(rf"{block}(?:{part})") for part in row.parts)
        rules.append(Rule(row.module, parts, row.name or row.module, row.ndim, place))
    aux = [rf"{block}(?:{p})" for p in family.block_aux]
    aux += [rf"{prefix}(?:{p})" for p in family.aux]
    places = [block, prefix + family.stage] if family.stage else [block]
    return _Compiled(tuple(rules), tuple(map(re.compile, aux)), tuple(map(re.compile, places)))


def fit(family: Family, shapes: Mapping[str, Shape]) -> Fit | None:
    """Group the names as this family's; None where no prunable name matches."""
    rules, aux_patterns, places = _compiled(family)
    names = [(bare(name), name) for name in shapes]
    found, problems = assemble(names, shapes, rules, family.stages)
    if not found:
        return None
    prefixes = sorted({str(f.prefix) for f in found})
    if len(prefixes) > 1:
        problems.append(f"all blocks must have one prefix, got {prefixes}")
    claimed = {name for f in found for name in f.layer.parameters}
    counts = Counter((f.layer.stage, f.layer.block, f.layer.module) for f in found)
    blocks: dict[tuple[int | None, int | None], None] = {}  # an ordered set
    aux = []
    for short, name in names:
        match = next(filter(None, (pattern.match(short) for pattern in places)), None)
        stage, block = locate(match.groupdict() if match else {}, name, family.stages)
        if block is not None:
            blocks[stage, block] = None
        if name in claimed:
            continue
        if len(shapes[name]) > 1 and not any(p.fullmatch(short) for p in aux_patterns):
            problems.append(f"unknown weight {show(name, shapes[name])}")
        aux.append(Layer(name.removesuffix(".weight"), AUX, (name,), stage, block))
    for (stage, block), (module, wanted) in product(blocks, family.per_block.items()):
        if (got := counts[stage, block, module]) != wanted:
            where = f"block {block}" + ("" if stage is None else f" of stage {stage}")
            problems.append(f"{where} must have {wanted} {module} layer(s), got {got}")
    modules = by_module(found, (rule.module for rule in rules), aux)
    return Fit(family, modules, problems)
