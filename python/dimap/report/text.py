"""How reports write numbers, names and tables: at most 80 columns wide, counts in three digits."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from ..groups import Located, position

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

BAR = 10  # cells


def short(count: int | None) -> str:
    """Three digits and a unit: 28288354 -> "28.3M"; "" for None."""
    if count is None:
        return ""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 0.9995 * size:  # what would round to 1000 of the unit below
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return str(count)


def tiny(value: float | None) -> str:
    """ "3.56e-06"; "" for None."""
    return "" if value is None else f"{value:.2e}"


def leaves(names: Sequence[str]) -> list[str]:
    """Names of one block's layers without the parents that all of them share."""
    split = [name.split(".") for name in names]
    keep = 1 if len(names) > 1 else 2  # parts that stay in any case
    shared, most = 0, min(map(len, split)) - keep
    while shared < most and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def names_in_blocks(layers: Sequence[Located]) -> dict[str, str]:
    """Layer name -> its name in its block. The layers stand block after block."""
    found: dict[str, str] = {}
    for _, members in groupby(layers, key=position):
        names = [layer.name for layer in members]
        found |= dict(zip(names, leaves(names), strict=True))
    return found


class Column(NamedTuple):
    """Of a table: its heading, and what it says of the object of a row.

    say: gives the text; or a share in [0, 1], which is drawn as a bar. False is said as "".
    """

    title: str
    say: Callable[[Any], str | float]
    left: bool = False  # where it is aligned

    def cells(self, rows: Sequence[Any]) -> list[str | float]:
        return [self.say(row) or "" for row in rows]


def filled(
    columns: Sequence[Column], rows: Sequence[Any]
) -> tuple[list[Column], list[tuple[str | float, ...]]]:
    """The columns that say anything of the rows, and all cells row by row."""
    used = {column: cells for column in columns if any(cells := column.cells(rows))}
    return list(used), list(zip(*used.values(), strict=True))


def table(columns: Sequence[Column], rows: Sequence[Any]) -> Table:
    """A table for rich, without the columns that say nothing."""
    from rich import box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    used, lines = filled(columns, rows)
    for column in used:
        justify: Any = "left" if column.left else "right"
        table.add_column(column.title, justify=justify, no_wrap=True)
    bar = partial(ProgressBar, 1, width=BAR, complete_style="cyan", finished_style="cyan")
    for line in lines:
        table.add_row(*(Text(cell) if isinstance(cell, str) else bar(cell) for cell in line))
    return table


def make_console(**options: Any) -> Console:
    """rich's console; where NO_COLOR is set, without bold and dim, too."""
    from rich.console import Console

    if os.environ.get("NO_COLOR"):
        options["color_system"] = None
    return Console(**options)


class Fitting:
    """A table that, where there is no room for it, loses columns: never digits of a number.

    dropped: the titles of the columns that it can do without, the first one goes first.
    """

    def __init__(self, table: Table, *dropped: str) -> None:
        self.table, self.dropped = table, dropped

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        shown = copy(self.table)
        wide = options.update(max_width=10_000)
        for title in self.dropped:
            drawn = (console.render_lines(shown, room, pad=False) for room in (options, wide))
            if next(drawn) == next(drawn):
                break
            left = (column for column in shown.columns if column.header != title)
            shown.columns = [replace(column, _index=at) for at, column in enumerate(left)]
        yield shown


def plain(renderable: Any) -> str:
    """What rich draws, as text of 80 columns; lines are drawn with ASCII characters."""
    drawn = io.StringIO()
    make_console(file=drawn, width=80, no_color=True, force_jupyter=False).print(renderable)
    lines = drawn.getvalue().replace("─", "-").splitlines()
    return "\n".join(line.rstrip() for line in lines)
