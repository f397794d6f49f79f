"""The options that bound what is left of a model, and of each layer."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from .grouping import adding

PANEL = "Budgets and limits"
BUDGETS = {"flops", "nominal_flops", "params", "size"}  # each of which finds a sparsity
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{unit}i": 1024 ** (i + 1) for i, unit in enumerate("kmgt")}


def parse_share(text: object) -> float:
    """A share in [0, 1], as 0.6 or 60%."""
    share = _number(text)
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"must be in [0, 1], got {text}")
    return share


def _number(text: object) -> float:
    said = str(text).strip()
    try:
        return float(said.removesuffix("%")) / (100 if said.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"must be a share as 0.6 or 60%, got {said!r}") from None


def parse_sparsity(text: object) -> float | str:
    """A number, or "auto"."""
    return "auto" if text == "auto" else _number(text)


def parse_size(text: object) -> int:
    """Bytes, as 120MB (10^6) or 120MiB (2^20)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", str(text).strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"must be bytes as 120MB or 120MiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


def _option(parser: Any, metavar: str, text: str) -> Any:
    return Annotated[
        str | None,
        typer.Option(
            parser=parser, metavar=metavar, help=text, rich_help_panel=PANEL, show_default=False
        ),
    ]


OPTIONS = {
    "flops": _option(
        parse_share,
        "SHARE",
        "Find the smallest sparsity that leaves at most this share of the FLOPs, of nonzero weights x "
        "tokens; as 60% or 0.6.",
    ),
    "nominal_flops": _option(
        parse_share, "SHARE", "The same for the paper's FLOPs: of each layer its module's share."
    ),
    "params": _option(parse_share, "SHARE", "The same for the parameters that masks leave."),
    "size": _option(
        parse_size, "BYTES", "The same for the size of a bitmask OUT, as 120MB (--format bitmask)."
    ),
    "min_keep": _option(
        parse_share,
        "SHARE",
        "Keep at least this share of each layer; others of its scope get less.",
    ),
    "max_keep": _option(
        parse_share, "SHARE", "Keep at most this share of each layer; others of its scope get more."
    ),
    "limit": Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=LOW:HIGH",
            help="Both for some layers, by name as in 'layers.0.*=30%:' or by module, as mlp=:60%.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ],
}


def parse(limit: list[str] | None, **given: Any) -> dict[str, Any]:
    """The options as arguments of `dimap.Budgets`, of values that JSON has; those that were given."""
    found = {name: value for name, value in given.items() if value is not None}
    for option in limit or []:
        pattern, equals, ends = option.rpartition("=")
        low, colon, high = ends.partition(":")
        if not (pattern and equals and colon):
            raise typer.BadParameter(f"--limit must be PATTERN=LOW:HIGH, got {option!r}")
        try:
            pair = [parse_share(low) if low else 0.0, parse_share(high) if high else 1.0]
        except typer.BadParameter as error:
            raise typer.BadParameter(f"--limit {option}: {error.message}") from None
        found.setdefault("limits", {})[pattern] = pair
    return found


budgeted = adding(OPTIONS, "budgets", parse)
