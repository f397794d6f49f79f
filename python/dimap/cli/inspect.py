"""`dimap inspect`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..report.text import Column, Fitting, make_console, table
from .common import Debug, Json, Key, Layers, RandomInit, Source, print_json, report_errors
from .grouping import Grouping, grouped, open_grouped
from .progress import Bar

if TYPE_CHECKING:
    from ..checkpoint.inspect import Inspection

COUNTS = (
    Column("weights", lambda count: f"{count.weights:,}"),
    Column("nonzero", lambda count: f"{count.nonzero:,}"),
    Column("sparsity", lambda count: f"{100 * count.sparsity:.2f} %"),
    Column("dtype", lambda count: ", ".join(count.dtypes), left=True),
)
LOST = ("nonzero", "weights")  # where there is no room for all


@grouped
def inspect(
    source: Source,
    key: Key = None,
    random_init: RandomInit = False,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
    *,
    grouping: Grouping,
) -> None:
    """Show the modules of a checkpoint, their layers and weights, and how sparse they are.

    Of an unknown model it shows the matrices and the grouping that their names suggest.
    """
    with report_errors(debug), Bar("opening") as bar:
        from ..checkpoint import inspect as work

        checkpoint = open_grouped(source, grouping, key=key, random_init=random_init)
        found = work.inspect(checkpoint, bar)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found, layers=layers)


def print_inspection(found: Inspection, *, layers: bool) -> None:
    """What it is, and one line for each module; with `layers`, one for each that can be pruned."""
    from rich.table import Table
    from rich.text import Text

    from ..groups import AUX

    console = make_console()
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    head.add_row(found.form, Text(found.path))
    for tower, family in found.families.items():
        title = f"family of {tower}" if tower else "family"
        head.add_row(title, Text(f"{family.name}: {family.models}"))
    if found.nm:
        head.add_row("N:M", found.nm)
    names = Column("module", lambda module: module.name, left=True)
    sizes = Column("layers", lambda module: str(len(module.layers)))
    every = replace(found.total, layers=[x for m in found.modules for x in m.layers])
    modules = table([names, sizes, *COUNTS], [*found.modules, every])
    modules.rows[-2].end_section = True
    notes = (Text(note, style="yellow") for note in found.notes)
    console.print(head, Fitting(modules, "dtype", "layers", *LOST), *notes, sep="\n")
    if not layers:
        return
    module_of = {x.name: m.name for m in found.modules if m.name != AUX for x in m.layers}
    rows = [layer for layer in every.layers if layer.name in module_of]
    shown = [
        Column("layer", lambda layer: layer.name, left=True),
        Column("module", lambda layer: module_of[layer.name], left=True),
        *COUNTS,
        Column("N:M", lambda layer: layer.nm),
    ]
    made = table(shown, rows)
    for row, (here, after) in zip(made.rows, pairwise(rows), strict=False):
        row.end_section = module_of[here.name] != module_of[after.name]
    console.print(Fitting(made, "dtype", "module", *LOST))
