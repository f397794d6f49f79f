"""The options that bound what is left of a model, and of each layer."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

import typer

from ..groups.plan import share
from .common import adding, option

BUDGETS = {"flops", "nominal_flops", "params", "size"}  # each of which finds a sparsity
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{unit}i": 1024 ** (i + 1) for i, unit in enumerate("kmgt")}


def parse_share(text: object) -> float:
    """A share in [0, 1], as 0.6 or 60%."""
    try:
        return share("", str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_sparsity(text: object) -> float | str:
    """A number, or "auto"."""
    return "auto" if text == "auto" else parse_share(text)


def parse_size(text: object) -> int:
    """Bytes, as 120MB (10^6) or 120MiB (2^20)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", str(text).strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"must be bytes as 120MB or 120MiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


_option = partial(option, rich_help_panel="Budgets and limits")
_share = partial(_option, parser=parse_share, metavar="SHARE")


def parse(
    flops: Annotated[
        str | None,
        _share(
            "Find the smallest sparsity that leaves at most this share of the FLOPs, of nonzero "
            "weights x tokens; as 60% or 0.6."
        ),
    ] = None,
    nominal_flops: Annotated[
        str | None, _share("The same for the paper's FLOPs: of each layer its module's share.")
    ] = None,
    params: Annotated[str | None, _share("The same for the parameters that masks leave.")] = None,
    size: Annotated[
        str | None,
        _option(
            "The same for the size of a bitmask OUT, as 120MB (--format bitmask).",
            parser=parse_size,
            metavar="BYTES",
        ),
    ] = None,
    min_keep: Annotated[
        str | None, _share("Keep at least this share of each layer; others of its scope get less.")
    ] = None,
    max_keep: Annotated[
        str | None, _share("Keep at most this share of each layer; others of its scope get more.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        _option(
            "Both for some layers, by name as in 'layers.0.*=30%:' or by module, as mlp=:60%.",
            metavar="PATTERN=LOW:HIGH",
        ),
    ] = None,
) -> dict[str, Any]:
    """The options as arguments of `dimap.Budgets`, of values that JSON has; those that were given."""
    found: dict[str, Any] = {
        "flops": flops, "nominal_flops": nominal_flops, "params": params, "size": size,
        "min_keep": min_keep, "max_keep": max_keep,
    }  # fmt: skip
    found = {name: value for name, value in found.items() if value is not None}
    for given in limit or []:
        pattern, equals, ends = given.rpartition("=")
        low, colon, high = ends.partition(":")
        if not (pattern and equals and colon):
            raise typer.BadParameter(f"--limit must be PATTERN=LOW:HIGH, got {given!r}")
        try:
            pair = [parse_share(low or 0), parse_share(high or 1)]
        except typer.BadParameter as error:
            raise typer.BadParameter(f"--limit {given}: {error.message}") from None
        found.setdefault("limits", {})[pattern] = pair
    return found


budgeted = adding("budgets", parse)
