"""Layers, and how names become layers by rules: known families and the caller's own patterns alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, Protocol, TypeAlias

AUX = "aux"  # the module of what is never pruned
Shape: TypeAlias = tuple[int, ...]
Modules: TypeAlias = "dict[str, list[Layer]]"


@dataclass(frozen=True)
class Layer:
    """Parameters whose squares are summed together: one tensor, or several such as split q, k, v.

    name: the parameter's without `.weight`; for several, their common prefix and e.g. `qkv`.
    module: "qkv", "proj", "mlp", "aux", or the caller's own.
    parameters: names, in the order in which their weights are ranked: q, k, v.
    stage: from 0; None outside stages and in models without stages.
    block: from 0 within its stage; None outside blocks.
    """

    name: str
    module: str
    parameters: tuple[str, ...]
    stage: int | None = None
    block: int | None = None


class Located(Protocol):
    """What has a place in a model: a `Layer`, or what is reported of one."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> int | None: ...
    @property
    def block(self) -> int | None: ...


def position(layer: Located, nowhere: float = math.inf) -> tuple[float, float]:
    """Sort key: stage and block, with `nowhere` for those that have none."""
    return (
        nowhere if layer.stage is None else layer.stage,
        nowhere if layer.block is None else layer.block,
    )


class Rule(NamedTuple):
    """A kind of prunable layer, with one pattern for each tensor of the layer."""

    module: str
    parts: tuple[re.Pattern[str], ...]
    name: str = ""  # of a layer of several tensors; "" joins theirs
    ndim: int | None = None  # None: two or more
    place: int = 0  # within a block


class Found(NamedTuple):
    layer: Layer
    rule: Rule
    prefix: str | None  # what stands before the network's own names


def assemble(
    names: Iterable[tuple[str, str]],  # (what the patterns match, the parameter's name)
    shapes: Mapping[str, Shape],
    rules: Sequence[Rule],
    stages: range | None = None,
) -> tuple[list[Found], list[str]]:
    """Give each name to the first rule that matches all of it: layers in order, and problems.

    A stage is the captured number's place in `stages`, or the number itself.
    """
    problems: list[str] = []
    groups: dict[tuple[Rule, object], dict[int, str]] = {}  # -> part -> parameter
    captured: dict[tuple[Rule, object], dict[str, str | None]] = {}
    for bare, name in names:
        hit = _hit(bare, rules)
        if hit is None:
            continue
        rule, part, match = hit
        ndim = len(shapes[name])
        if ndim < 2 or rule.ndim not in (None, ndim):
            wanted, got = rule.ndim or "two or more", show(name, shapes[name])
            problems.append(f"a weight to prune must have {wanted} dimensions, got {got}")
        # One tensor is a layer by itself; several are joined by what their patterns capture.
        key: tuple[Rule, object] = (rule, name if len(rule.parts) == 1 else match.groups())
        group = groups.setdefault(key, {})
        if part in group:
            got = f"{group[part]} and {name} for {rule.parts[part].pattern}"
            problems.append(f"a layer must have one tensor for each of its patterns, got {got}")
        group[part] = name
        captured[key] = match.groupdict()
    found = []
    for key, group in groups.items():
        rule, numbers = key[0], captured[key]
        for part, pattern in enumerate(rule.parts):
            if part not in group:
                got = ", ".join(group.values())
                problems.append(f"a layer must have a tensor for {pattern.pattern}, got only {got}")
        parameters = tuple(group[part] for part in sorted(group))
        stage, block = locate(numbers, parameters[0], stages)
        layer = Layer(_layer_name(parameters, rule), rule.module, parameters, stage, block)
        found.append(Found(layer, rule, numbers.get("prefix")))
    return sorted(found, key=_order), problems


def _hit(bare: str, rules: Sequence[Rule]) -> tuple[Rule, int, re.Match[str]] | None:
    for rule in rules:
        for part, pattern in enumerate(rule.parts):
            if match := pattern.fullmatch(bare):
                return rule, part, match
    return None


def locate(
    captured: Mapping[str, str | None], name: str, stages: range | None = None
) -> tuple[int | None, int | None]:
    """Stage and block from the named groups of a match."""
    for group in ("stage", "block"):
        if not (captured.get(group) or "0").isdecimal():
            got = f"{captured[group]!r} in {name}"
            raise ValueError(f"group {group!r} must capture a number, got {got}")
    stage, block = captured.get("stage"), captured.get("block")
    number = None if not stage else int(stage)
    if number is not None and stages is not None:
        number = stages.index(number)
    return number, None if not block else int(block)


def by_module(found: Sequence[Found], names: Iterable[str], aux: list[Layer]) -> Modules:
    modules = {name: [f.layer for f in found if f.layer.module == name] for name in names}
    return {**modules, AUX: aux}


def _order(found: Found) -> tuple[object, ...]:
    """Sort key that does not depend on the mapping's order; 10 comes after 9."""
    words = re.split(r"(\d+)", found.layer.name)
    natural = [int(word) if i % 2 else word for i, word in enumerate(words)]
    return *position(found.layer, -1), found.rule.place, natural


def _layer_name(parameters: tuple[str, ...], rule: Rule) -> str:
    if len(parameters) == 1:
        return parameters[0].removesuffix(".weight")
    split = [name.split(".") for name in parameters]
    columns = zip(*split, strict=False)
    head = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    tails = (".".join(words[len(head) :]).removesuffix(".weight") for words in split)
    return ".".join([*head, rule.name or "+".join(tails)])


# What errors show


def show(name: str, shape: Shape) -> str:
    return f"{name} {shape}"


def first(lines: Sequence[str], most: int = 8) -> list[str]:
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]


def kinds(shapes: Mapping[str, Shape]) -> str:
    """The names of two or more dimensions (all, if there are none), numbers as *, with counts."""
    kinds: dict[str, list[Shape]] = {}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for name, shape in (matrices or shapes).items():
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(shape)
    lines = [f"  {len(found)} x {show(kind, found[0])}" for kind, found in kinds.items()]
    return "\n".join(first(lines, 12))
