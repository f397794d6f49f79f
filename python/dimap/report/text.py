"""How reports write numbers, names and tables: at most 80 columns wide, counts in three digits."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

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


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: tuple[int, ...]) -> Table:
    """A table of `rows` without its empty columns; `left`: columns aligned to the left."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    used = [place for place in range(len(header)) if any(row[place] for row in rows)]
    for place in used:
        justify: Any = "left" if place in left else "right"
        table.add_column(header[place], justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in used))
    return table


class Bar:
    """A density in [0, 1] as a bar: eighths of a cell where the terminal has them, else ASCII."""

    def __init__(self, density: float) -> None:
        self.density = density

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        whole, eighths = divmod(round(self.density * BAR * 8), 8)
        bar = ("█" * whole + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")).ljust(BAR)
        if options.ascii_only:
            bar = ("#" * round(self.density * BAR)).ljust(BAR, ".")
        yield Text(bar, style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(BAR, BAR)


def plain(renderable: Any) -> str:
    """What rich draws, as text of 80 columns; lines are drawn with ASCII characters."""
    from rich.console import Console

    drawn = io.StringIO()
    Console(file=drawn, width=80, color_system=None, force_jupyter=False).print(renderable)
    lines = drawn.getvalue().replace("─", "-").splitlines()
    return "\n".join(line.rstrip() for line in lines)
