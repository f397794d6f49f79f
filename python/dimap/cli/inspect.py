"""`dimap inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..report.text import Fitting, make_console
from .common import Debug, Json, Key, Layers, RandomInit, Source, print_json, report_errors
from .grouping import Grouping, grouped
from .progress import Bar

if TYPE_CHECKING:
    from rich.table import Table

    from ..checkpoint.inspect import Count, Inspection

COLUMNS = ("weights", "nonzero", "sparsity", "dtype")
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
        from ..checkpoint import open_checkpoint
        from ..groups import choose

        with open_checkpoint(source, key=key, random_init=random_init) as checkpoint:
            checkpoint.choice = choose(**grouping)
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
    table = _table("module", "layers")
    for module in found.modules:
        table.add_row(module.name, str(len(module.layers)), *_counts(module))
    total = str(sum(len(module.layers) for module in found.modules))
    cells = (found.total.name, total, *_counts(found.total))
    for column, text in zip(table.columns, cells, strict=True):
        column.footer = text
    table.columns[1].justify = "right"
    notes = (Text(note, style="yellow") for note in found.notes)
    console.print(head, Fitting(table, "dtype", "layers", *LOST), *notes, sep="\n")
    if not layers:
        return
    table = _table("layer", "module", more=("N:M",) if found.nm else ())
    table.show_footer = False
    for module in found.modules:
        for layer in module.layers if module.name != AUX else ():
            nm = [layer.nm or ""] if found.nm else []
            table.add_row(Text(layer.name), module.name, *_counts(layer), *nm)
        table.add_section()
    console.print(Fitting(table, "dtype", "module", *LOST))


def _table(*columns: str, more: Sequence[str] = ()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        *columns, *COLUMNS, *more, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True
    )
    for column in table.columns[2:5]:
        column.justify, column.no_wrap = "right", True
    return table


def _counts(count: Count) -> tuple[str, ...]:
    share, dtypes = f"{100 * count.sparsity:.2f} %", ", ".join(count.dtypes)
    return (f"{count.weights:,}", f"{count.nonzero:,}", share, dtypes)
