"""`dimap families`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..report.text import make_console
from .common import Debug, Json, print_json, report_errors

if TYPE_CHECKING:
    from ..families import Family


def families(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Show the table of one family.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the models whose parameter names are known, and how others are pruned."""
    with report_errors(debug):
        from ..families import FAMILIES
        from ..groups.choice import choose

        known = {family.name: family for family in FAMILIES}
        if name is not None:
            choose(family=name)  # or an error that says what is near
        shown = [known[name]] if name in known else FAMILIES
        if as_json:
            print_json([_to_dict(family) for family in shown])
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        console = make_console(highlight=False)
        if name in known:
            family = known[name]
            console.print(Text(f"{family.name}: {family.models}"), Text(f"block  {family.block}"))
            table = Table("module", "weights of a block", box=box.SIMPLE_HEAD)
            for row in family.rows:
                table.add_row(row.module, Text(", ".join(row.parts)))
            console.print(table)
            return
        table = Table("family", "models", box=box.SIMPLE_HEAD)
        for family in shown:
            table.add_row(family.name, Text(family.models))
        table.add_row("transformer", "any other, by the words of its names: --family transformer")
        console.print(table)
        console.print(
            Text(
                "A name may have any beginning; each tower of blocks is pruned by itself. Or name the "
                "weights: --pattern 'MODULE=REGEX'.",
                style="dim",
            )
        )


def _to_dict(family: Family) -> dict[str, Any]:
    modules: dict[str, list[Any]] = {}
    for row in family.rows:
        modules.setdefault(row.module, []).append(row.parts)
    told = {"name": family.name, "models": family.models, "language": family.language}
    return {**told, "block": family.block, "modules": modules}
