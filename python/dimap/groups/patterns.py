"""The caller's own patterns: names become layers by regexes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..families import Row
from .layers import (
    AUX,
    Modules,
    Shape,
    assemble,
    aux_layer,
    by_module,
    claimed,
    compiled,
    first,
    kinds,
)


def group_by(patterns: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Modules:
    rows = _rows(patterns)
    found, problems, hit = assemble([(name, name) for name in shapes], shapes, rows)
    for row in rows:
        if row not in hit:
            regexes = ", ".join(map(repr, row.parts))
            problems.append(
                f"patterns[{row.module!r}] must match a parameter that no earlier pattern "
                f"matches, got none for {regexes} among:\n{kinds(shapes)}"
            )
    if problems:
        raise ValueError("\n".join(first(problems)))
    known = claimed(found)
    return by_module(found, patterns, (aux_layer(name) for name in shapes if name not in known))


def _rows(patterns: object) -> list[Row]:
    if not isinstance(patterns, Mapping):
        kind = type(patterns).__name__
        raise TypeError(f"patterns must be a mapping of module names to regexes, got {kind}")
    found = []
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
            parts = tuple(row) if isinstance(row, (tuple, list)) else (row,)
            if not parts or not all(isinstance(part, str) for part in parts):
                raise TypeError(f"patterns[{module!r}] must hold regexes as strings, got {row!r}")
            if len(parts) == 1:
                parts = _spread(parts[0])
            for part in parts:
                compiled(f"patterns[{module!r}] must hold", part)
            found.append(Row(module, parts, ndims=(), stacked=None))
    if not found:
        raise ValueError(f"patterns must name at least one module, got {patterns!r}")
    return found


def _spread(regex: str) -> tuple[str, ...]:
    """A regex with a group `part`, as in (?P<part>q|k|v), as one for each of its alternatives."""
    found = re.search(r"\(\?P<part>([^()]*)\)", regex)
    if found is None:
        return (regex,)
    head, tail = regex[: found.start()], regex[found.end() :]
    return tuple(f"{head}(?:{part}){tail}" for part in found[1].split("|"))
