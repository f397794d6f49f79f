"""Which parameters are pruned, and which of them together: names become layers and modules.

Nothing here reads a weight. `find_modules` takes a model or a state dict, `group_names` only names
and shapes. The tables of known names are in `families`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ..families import BUFFERS, FAMILIES, PREFIXES, WRAPPERS, Family
from ._assemble import Found, Layer, Located, Rule, Shape, assemble, locate, position, show

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "AUX",
    "Layer",
    "Located",
    "find_modules",
    "group_names",
    "is_parameter",
    "position",
    "shapes_of",
]

AUX = "aux"
Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"
Modules: TypeAlias = "dict[str, list[Layer]]"
Patterns: TypeAlias = "Mapping[str, str | Sequence[str | tuple[str, ...]]]"


def find_modules(model: Model, patterns: Patterns | None = None) -> dict[str, list[Layer]]:
    """Group a model's parameters into layers and modules, by their names and shapes alone.

    model: an nn.Module or a state dict; any device, meta too. Of a state dict, buffers are left
        out: those of `families.BUFFERS`, and what is neither floating point nor called `weight`.
    patterns: instead of the known families, the caller's own: module name -> regex, or a list of
        them, each matched against whole parameter names (`re.fullmatch`); the first that matches
        wins. A tuple inside a list is one layer made of several tensors, in that order, joined by
        what its regexes capture. Named groups `stage` and `block` give those numbers:

            {"qkv": [tuple(rf"blocks\\.(?P<block>\\d+)\\.attn\\.{x}\\.weight" for x in "qkv")],
             "mlp": r"blocks\\.(?P<block>\\d+)\\.mlp\\.fc[12]\\.weight"}

    Returns module name -> layers, "aux" (never pruned) last; every parameter is in exactly one
    layer. Layers of a module stand in the order of stage, block and place in the block (own
    patterns: stage, block, name with its numbers taken as numbers), however the mapping is ordered:
    so a model, its file (safetensors sorts names) and its split or fused form resolve ties alike.
    "aux" keeps the mapping's order.

    Raises ValueError for a model of no known family or one that differs from it, and for patterns
    that are malformed, match nothing, or match a parameter of fewer than two dimensions; TypeError
    for anything but a model, a mapping of tensors, or patterns of the form above.
    """
    return group_names(shapes_of(model), patterns)


def shapes_of(model: Model) -> dict[str, Shape]:
    """The names and shapes of a model's parameters, or of those in a state dict.

    Raises TypeError for anything but a model or a mapping of tensors.
    """
    from torch import Tensor, nn

    if isinstance(model, nn.Module):
        return {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: object = model  # callers are not bound by the annotation
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"model must be an nn.Module or a mapping of names to tensors, got {kind}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"a state dict must hold tensors only, got {kind} under {name!r}")
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if is_parameter(name, tensor.is_floating_point())
    }


def is_parameter(name: str, floating_point: bool) -> bool:
    """Whether an entry of a state dict is taken for a parameter, known buffers aside.

    A weight of another type is one too: quantized weights are told apart from counters this way.
    """
    return floating_point or name.rpartition(".")[2] == "weight"


def group_names(
    shapes: Mapping[str, Sequence[int]], patterns: Patterns | None = None
) -> dict[str, list[Layer]]:
    """`find_modules` on names and shapes: leaves out known buffers, knows nothing of dtypes."""
    seen = {name: tuple(s) for name, s in shapes.items() if not _BUFFER.fullmatch(_bare(name))}
    if not seen:
        raise ValueError("model must have at least one parameter, got none")
    if patterns is not None:
        return _group_by(patterns, seen)
    fits = [fit for family in FAMILIES if (fit := _fit(family, seen)) is not None]
    for fit in fits:
        if not fit.problems:
            return fit.modules
    near = [fit for fit in fits if all(fit.modules.values())]  # it has a layer in every module
    nearest = min(near, key=lambda fit: len(fit.problems), default=None)
    raise ValueError(_describe_misfit(nearest) if nearest else _describe_unknown(seen))


_BUFFER = re.compile("|".join(BUFFERS))


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _modules(found: Sequence[Found], names: Iterable[str], aux: list[Layer]) -> Modules:
    modules = {name: [f.layer for f in found if f.layer.module == name] for name in names}
    return {**modules, AUX: aux}


# Known families


class _Fit(NamedTuple):
    family: Family
    modules: Modules
    problems: list[str]


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


def _fit(family: Family, shapes: Mapping[str, Shape]) -> _Fit | None:
    """Group the names as this family's; None where no prunable name matches."""
    rules, aux_patterns, places = _compiled(family)
    names = [(_bare(name), name) for name in shapes]
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
    for bare, name in names:
        match = next(filter(None, (pattern.match(bare) for pattern in places)), None)
        stage, block = locate(match.groupdict() if match else {}, name, family.stages)
        if block is not None:
            blocks[stage, block] = None
        if name in claimed:
            continue
        if len(shapes[name]) > 1 and not any(p.fullmatch(bare) for p in aux_patterns):
            problems.append(f"unknown weight {show(name, shapes[name])}")
        aux.append(Layer(name.removesuffix(".weight"), AUX, (name,), stage, block))
    for (stage, block), (module, wanted) in product(blocks, family.per_block.items()):
        if (got := counts[stage, block, module]) != wanted:
            where = f"block {block}" + ("" if stage is None else f" of stage {stage}")
            problems.append(f"{where} must have {wanted} {module} layer(s), got {got}")
    modules = _modules(found, dict.fromkeys(rule.module for rule in rules), aux)
    return _Fit(family, modules, problems)


# The caller's own patterns


def _group_by(patterns: Patterns, shapes: Mapping[str, Shape]) -> Modules:
    rules = _own_rules(patterns)
    found, problems = assemble([(name, name) for name in shapes], shapes, rules)
    for rule in rules:
        if not any(f.rule == rule for f in found):
            regexes = ", ".join(repr(part.pattern) for part in rule.parts)
            problems.append(
                f"patterns[{rule.module!r}] must match a parameter that no earlier pattern "
                f"matches, got none for {regexes} among:\n{_kinds(shapes)}"
            )
    if problems:
        raise ValueError("\n".join(_first(problems)))
    claimed = {name for f in found for name in f.layer.parameters}
    aux = [Layer(n.removesuffix(".weight"), AUX, (n,)) for n in shapes if n not in claimed]
    return _modules(found, patterns, aux)


def _own_rules(patterns: object) -> list[Rule]:
    if not isinstance(patterns, Mapping):
        kind = type(patterns).__name__
        raise TypeError(f"patterns must be a mapping of module names to regexes, got {kind}")
    rules = []
    for module, value in patterns.items():
        if not isinstance(module, str) or module in ("", AUX):
            got = repr(module)
            raise ValueError(f"a module's name must be a string, not empty, not 'aux', got {got}")
        rows = [value] if isinstance(value, str) else value
        if isinstance(rows, tuple) or not isinstance(rows, Sequence):
            raise TypeError(
                f"patterns[{module!r}] must be a regex or a list of them (a layer of several "
                f"tensors is a tuple inside the list), got {value!r}"
            )
        if not rows:
            raise ValueError(f"patterns[{module!r}] must hold at least one regex, got {value!r}")
        for row in rows:
            parts = row if isinstance(row, tuple) else (row,)
            if not parts or not all(isinstance(part, str) for part in parts):
                raise TypeError(f"patterns[{module!r}] must hold regexes as strings, got {row!r}")
            rules.append(Rule(module, tuple(_compile(module, part) for part in parts)))
    if not rules:
        raise ValueError(f"patterns must name at least one module, got {patterns!r}")
    return rules


def _compile(module: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        got = f"{regex!r}: {error}"
        raise ValueError(f"patterns[{module!r}] must hold valid regexes, got {got}") from error


# What errors show

_HINT = r"""Name its modules with patterns=, regexes that match whole parameter names, for example
  patterns={"qkv": r"blocks\.(?P<block>\d+)\.attn\.qkv\.weight",
            "mlp": [r"blocks\.(?P<block>\d+)\.mlp\.fc1\.weight",
                    r"blocks\.(?P<block>\d+)\.mlp\.fc2\.weight"]}
What they leave over is never pruned."""


def _first(lines: Sequence[str], most: int = 8) -> list[str]:
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]


def _kinds(shapes: Mapping[str, Shape]) -> str:
    """The names of two or more dimensions (all, if there are none), numbers as *, with counts."""
    kinds: dict[str, list[Shape]] = {}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for name, shape in (matrices or shapes).items():
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(shape)
    lines = [f"  {len(found)} x {show(kind, found[0])}" for kind, found in kinds.items()]
    return "\n".join(_first(lines, 12))


def _describe_unknown(shapes: Mapping[str, Shape]) -> str:
    known = "; ".join(family.models for family in FAMILIES)
    matrices = sum(len(shape) > 1 for shape in shapes.values())
    return (
        f"model must be of a known family ({known}), got {len(shapes)} parameters, {matrices} of "
        f"two or more dimensions:\n{_kinds(shapes)}\n{_HINT}"
    )


def _describe_misfit(fit: _Fit) -> str:
    problems = "\n  ".join(_first(fit.problems))
    return (
        f"model must be of a known family, got one that resembles {fit.family.name} "
        f"({fit.family.models}) but differs:\n  {problems}\n{_HINT}"
    )
