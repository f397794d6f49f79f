"""Layers, and how names become layers by rules: known families and the caller's own patterns alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol, TypeAlias

from ..families import Row

AUX = "aux"  # the module of what is never pruned
Shape: TypeAlias = tuple[int, ...]
Modules: TypeAlias = "dict[str, list[Layer]]"


class Slice(str):
    """The name of one layer's part of a tensor that stacks several along its first axis.

    It reads "experts.down_proj[3]": number `at` of the tensor `parameter`.
    """

    parameter: str
    at: int

    def __new__(cls, parameter: str, at: int) -> Slice:
        self = super().__new__(cls, f"{parameter}[{at}]")
        self.parameter, self.at = parameter, at
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Slice, (self.parameter, self.at)


def slices(name: str, shape: Sequence[int]) -> list[str]:
    """The names of all slices of a tensor."""
    return [Slice(name, at) for at in range(shape[0])]


def whole(name: str) -> str:
    """The parameter that a layer's tensor is, or is a slice of."""
    return name.parameter if isinstance(name, Slice) else name


def wholes(names: Iterable[str]) -> list[str]:
    """The parameters of layers' tensors, each once, in their order."""
    return list(dict.fromkeys(map(whole, names)))


def part_shape(shapes: Mapping[str, Sequence[int]], name: str) -> Shape:
    """The shape of a layer's tensor, by the shapes of the parameters."""
    return tuple(shapes[whole(name)])[isinstance(name, Slice) :]


def part_of(tensors: Mapping[str, Any], name: str) -> Any:
    """A layer's tensor; a view of the parameter where it is a slice."""
    return tensors[name.parameter][name.at] if isinstance(name, Slice) else tensors[name]


@dataclass(frozen=True)
class Layer:
    """Parameters whose squares are summed together: one tensor, or several such as split q, k, v.

    name: the parameter's without `.weight`; for several, their common prefix and e.g. `qkv`.
    module: "qkv", "proj", "mlp", "aux", or the caller's own; with several towers, "text.qkv".
    parameters: names, in the order in which their weights are ranked: q, k, v. Of a tensor that
        stacks layers, such as experts, a layer has a slice: "experts.down_proj[3]".
    stage: from 0; None outside stages and in models without stages.
    block: from 0 within its stage; None outside blocks.
    tower: which row of blocks, where a model has several: "text"; "" where it has one.
    """

    name: str
    module: str
    parameters: tuple[str, ...]
    stage: int | None = None
    block: int | None = None
    tower: str = ""

    def in_tower(self, title: str) -> Layer:
        """The same layer, and its module, of the tower of this title."""
        module = f"{title}.{self.module}" if title else self.module
        return replace(self, module=module, tower=title)


class Located(Protocol):
    """What has a place in a model: a `Layer`, or what is reported of one."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> int | None: ...
    @property
    def block(self) -> int | None: ...
    @property
    def tower(self) -> str: ...


def position(layer: Located, nowhere: float = math.inf) -> tuple[str, float, float]:
    """Sort key: tower, stage and block, with `nowhere` for those that have none."""
    return (
        layer.tower,
        nowhere if layer.stage is None else layer.stage,
        nowhere if layer.block is None else layer.block,
    )


def holds_experts(name: str, shape: Shape) -> bool:
    """Whether a tensor stacks experts, [experts, out, in] or [experts, in, out]."""
    return len(shape) == 3 and "experts" in name.split(".")


def assemble(
    names: Iterable[tuple[str, str]],  # (what the patterns match, the parameter's name)
    shapes: Mapping[str, Shape],
    rows: Sequence[Row],
    stages: range | tuple[str, ...] | None = None,
    *,
    in_order: bool = False,
) -> tuple[list[Layer], list[str], set[Row]]:
    """Give each name to the first row with a pattern that matches all of it.

    in_order: in a block, layers stand in the order of their rows, not of their names alone.

    Returns the layers in order, problems, and the rows that have layers. A stage is the captured text's
    place in `stages`, or the number itself.
    """
    problems: list[str] = []
    groups: dict[tuple[Row, object], dict[int, str]] = {}  # -> part -> parameter
    captured: dict[tuple[Row, object], dict[str, str | None]] = {}
    patterns = [(row, i, re.compile(part)) for row in rows for i, part in enumerate(row.parts)]
    for bare, name in names:
        hits = ((row, i, match) for row, i, part in patterns if (match := part.fullmatch(bare)))
        row, part, match = next(hits, (None, 0, None))
        if row is None or match is None:
            continue
        shape = shapes[name]
        if len(shape) < 2 or (row.ndims and len(shape) not in row.ndims):
            wanted = " or ".join(map(str, row.ndims)) or "two or more"
            got = show(name, shape)
            problems.append(f"a weight to prune must have {wanted} dimensions, got {got}")
        stacked = holds_experts(name, shape) if row.stacked is None else row.stacked
        for piece in slices(name, shape) if stacked and shape else [name]:
            # One tensor is a layer by itself; several are joined by what their patterns capture.
            joint = match.groups(), piece.at if isinstance(piece, Slice) else None
            key: tuple[Row, object] = (row, piece if len(row.parts) == 1 else joint)
            group = groups.setdefault(key, {})
            if part in group:
                got = f"{group[part]} and {name} for {row.parts[part]}"
                problems.append(f"a layer must have one tensor for each of its patterns, got {got}")
            group[part] = piece
            captured[key] = match.groupdict()
    places = {row: i * in_order for i, row in enumerate(rows)}
    found = []
    for key, group in groups.items():
        row = key[0]
        for part, pattern in enumerate(row.parts):
            if part not in group and part not in row.optional:
                got = ", ".join(group.values())
                problems.append(f"a layer must have a tensor for {pattern}, got only {got}")
        parameters = tuple(group[part] for part in sorted(group))
        stage, block = locate(captured[key], parameters[0], stages)
        name = layer_name(parameters, row.name)
        layer = Layer(name, row.module, parameters, stage, block)
        found.append(((*position(layer, -1), places[row], natural(name)), layer))
    found.sort(key=lambda each: each[0])  # does not depend on the mapping's order
    return [layer for _, layer in found], problems, {row for row, _ in groups}


def locate(
    captured: Mapping[str, str | None], name: str, stages: range | tuple[str, ...] | None = None
) -> tuple[int | None, int | None]:
    """Stage and block from the named groups of a match."""
    stage, block = captured.get("stage"), captured.get("block")
    if isinstance(stages, tuple):
        number = None if not stage else stages.index(stage)
        stage = "0"
    for group, text in (("stage", stage), ("block", block)):
        if not (text or "0").isdecimal():
            raise ValueError(f"group {group!r} must capture a number, got {text!r} in {name}")
    if not isinstance(stages, tuple):
        number = None if not stage else int(stage)
        if number is not None and stages is not None:
            number = stages.index(number)
    return number, None if not block else int(block)


def prunable(modules: Mapping[str, Iterable[Layer]]) -> list[Layer]:
    """All layers but those of "aux"."""
    return [layer for module, found in modules.items() if module != AUX for layer in found]


def aux_layer(
    name: str, stage: int | None = None, block: int | None = None, tower: str = ""
) -> Layer:
    """The layer of a parameter that is never pruned."""
    return Layer(name.removesuffix(".weight"), AUX, (name,), stage, block, tower)


def by_module(found: Sequence[Layer], names: Iterable[str], aux: Iterable[Layer]) -> Modules:
    """The layers of each of these modules, and "aux"."""
    modules = {name: [layer for layer in found if layer.module == name] for name in names}
    return {**modules, AUX: list(aux)}


def claimed(found: Iterable[Layer]) -> set[str]:
    """The parameters of these layers."""
    return {whole(p) for layer in found for p in layer.parameters}


def natural(name: str) -> list[int | str]:
    """Sort key of a name in which 10 comes after 9."""
    return [int(word) if i % 2 else word for i, word in enumerate(re.split(r"(\d+)", name))]


def layer_name(parameters: Sequence[str], joint: str) -> str:
    """The name of a layer of these tensors; joint: the end of it where they are several."""
    if len(parameters) == 1:
        return parameters[0].removesuffix(".weight")
    split = [name.split(".") for name in parameters]
    columns = zip(*split, strict=False)
    head = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    tails = (".".join(words[len(head) :]).removesuffix(".weight") for words in split)
    return ".".join([*head, joint or "+".join(tails)])


def compiled(claim: str, regex: str) -> re.Pattern[str]:
    """A regex of the caller's. claim: how its error begins."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"{claim} valid regexes, got {regex!r}: {error}") from error


# What errors show


def show(name: str, shape: Shape) -> str:
    return f"{name} {shape}"


def first(lines: Sequence[str], most: int = 8) -> list[str]:
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]


def kind_of(name: str) -> str:
    """A name with its numbers as *."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def kinds(shapes: Mapping[str, Shape], most: int = 12) -> str:
    """The names of two or more dimensions (all, if there are none), numbers as *, with counts."""
    kinds: dict[str, list[Shape]] = {}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for name, shape in (matrices or shapes).items():
        kinds.setdefault(kind_of(name), []).append(shape)
    lines = [f"  {len(found)} x {show(kind, found[0])}" for kind, found in kinds.items()]
    return "\n".join(first(lines, most))
