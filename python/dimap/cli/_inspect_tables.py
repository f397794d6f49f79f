"""The tables of `dimap inspect`."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..checkpoint._inspect import Count, Inspection
from ..groups import AUX


def summary(inspection: Inspection) -> Group:
    """What it is, and one line for each module."""
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    head.add_row(inspection.form, Text(inspection.path))
    if inspection.family:
        head.add_row("family", Text(f"{inspection.family.name}: {inspection.family.models}"))
    columns = ("module", "layers", "weights", "nonzero", "sparsity", "dtype")
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    for column in table.columns[1:5]:
        column.justify = "right"
    for module in inspection.modules:
        table.add_row(*_row(module, len(module.layers)))
    layers = sum(len(module.layers) for module in inspection.modules)
    for column, text in zip(table.columns, _row(inspection.total, layers), strict=True):
        column.footer = text
    return Group(head, table, *(Text(note, style="yellow") for note in inspection.notes))


def layer_table(inspection: Inspection) -> Table:
    """One line for each layer that can be pruned, module after module."""
    columns = ("layer", "module", "weights", "nonzero", "sparsity", "dtype")
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[2:5]:
        column.justify = "right"
    for module in (module for module in inspection.modules if module.name != AUX):
        for layer in module.layers:
            name, *counts = _row(layer, 0)
            table.add_row(Text(name), module.name, *counts[1:])
        table.add_section()
    return table


def _row(count: Count, layers: int) -> tuple[str, ...]:
    share = f"{100 * count.sparsity:.2f} %"
    dtypes = ", ".join(count.dtypes)
    return (count.name, str(layers), f"{count.weights:,}", f"{count.nonzero:,}", share, dtypes)
