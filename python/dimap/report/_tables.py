"""The tables of a report: as rich renderables, and as plain text for where rich is missing.

Both are at most 80 columns wide; counts are shortened to three digits (JSON has them in full).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._types import LayerReport, ModuleReport, Report

MODULES = (
    "module", "layers", "weights", "kept", "removed", "threshold", "dense", "FLOPs", "nominal",
)  # fmt: skip
LAYERS = ("block", "layer", "weights", "density", "", "min |w|", "FLOPs")
BAR = 10  # cells
NAME = 24  # characters that are left for a layer's name
Row = tuple[str, ...]


def summary(report: Report) -> Any:
    """Whole model and modules, as a rich renderable."""
    from rich.console import Group
    from rich.text import Text

    rows, total = _module_rows(report)
    table = _table(MODULES, [*rows, total], left=(0,))
    table.rows[-1].style = "bold"
    table.rows[-2].end_section = True
    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in _head(report)]
    lines[0].stylize("bold")
    legend = [Text(line, style="dim") for line in _legend(report)]
    return Group(*lines, table, *legend, *(Text(note, style="yellow") for note in report.notes))


def layers(report: Report) -> Any:
    """One line per prunable layer, block after block, with a bar of its density."""
    members = _by_block(report.layers)
    rows: list[Sequence[Any]] = []
    for row, layer in zip(_layer_rows(members), members, strict=True):
        rows.append([*row[:4], _Bar(layer.density), *row[5:]])
    table = _table(LAYERS, rows, left=(1, 4))
    for line, layer, after in zip(table.rows, members, members[1:], strict=False):
        line.end_section = layer.stage != after.stage
    return table


def plain(report: Report, *, layers: bool = False) -> str:
    """The same in ASCII text."""
    rows, total = _module_rows(report)
    modules = _align([MODULES, *rows, total], left=(0,))
    parts = ["\n".join(_head(report)), modules, "\n".join([*_legend(report), *report.notes])]
    if layers:
        parts.append(_align([LAYERS, *_layer_rows(_by_block(report.layers))], left=(1, 4)))
    return "\n\n".join(part for part in parts if part)


# What the tables say


def _head(report: Report) -> list[str]:
    ratios = dict.fromkeys(report.sparsity.values())
    asked = [f"{ratio:g}" for ratio in ratios]
    if len(ratios) > 1:
        asked = [f"{module} {ratio:g}" for module, ratio in report.sparsity.items()]
    lines = [
        f"sparsity {', '.join(asked)}; scope {report.scope}; normalize {report.normalize}",
        f"parameters     {report.weights:,} -> {report.kept:,}, "
        f"{report.removed_percent:.2f} % removed",
        f"not zero       {report.nonzero:,}",
    ]
    for name, flops, percent in (
        ("FLOPs         ", report.flops, report.flops_removed_percent),
        ("FLOPs, nominal", report.flops_nominal, report.flops_nominal_removed_percent),
    ):
        if percent is not None:
            lines.append(
                f"{name} {_short(report.flops_dense)} -> {_short(flops)}, {percent:.2f} % removed"
            )
    return lines


def _legend(report: Report) -> list[str]:
    if report.input_size is None:
        return []
    size = " x ".join(map(str, report.input_size))
    return [
        f"FLOPs are multiply-adds of one {size} input. dense: before pruning;",
        "FLOPs: nonzero weights x tokens; nominal: the module's ratio, in all its layers.",
    ]


def _module_rows(report: Report) -> tuple[list[Row], Row]:
    """Rows of the module table, and its total."""
    rows = [
        (module.name, str(module.layers), *_counts(module, _tiny(module.threshold)))
        for module in report.modules
    ]
    if report.flops_other is not None:  # products of activations read no weight
        rows.append(("other", "", "", "", "", "", *[_short(report.flops_other)] * 3))
    layers = sum(module.layers for module in report.modules)
    return rows, ("all", str(layers), *_counts(report, ""))


def _counts(part: ModuleReport | Report, threshold: str) -> Row:
    return (
        _short(part.weights),
        _short(part.kept),
        f"{part.removed_percent:.1f} %",
        threshold,
        _short(part.flops_dense),
        _short(part.flops),
        _short(part.flops_nominal),
    )


def _layer_rows(layers: Sequence[LayerReport]) -> list[Row]:
    """Rows of the layer table; `layers` stand block after block."""
    rows: list[Row] = []
    for place, members in groupby(layers, key=_place):
        block = list(members)
        for layer, name in zip(block, _leaves([layer.name for layer in block]), strict=True):
            rows.append(
                (
                    ".".join(str(int(number)) for number in place if number != _NOWHERE),
                    name if len(name) <= NAME else ".." + name[2 - NAME :],
                    _short(layer.weights),
                    f"{100 * layer.density:.1f} %",
                    _ascii_bar(layer.density),
                    _tiny(layer.smallest_kept),
                    _short(layer.flops),
                )
            )
    return rows


_NOWHERE = float("inf")  # sorts what is outside stages and blocks last


def _place(layer: LayerReport) -> tuple[float, float]:
    return (
        _NOWHERE if layer.stage is None else layer.stage,
        _NOWHERE if layer.block is None else layer.block,
    )


def _by_block(layers: Sequence[LayerReport]) -> list[LayerReport]:
    return sorted(layers, key=_place)


def _leaves(names: list[str]) -> list[str]:
    """Names of one block's layers without the parents that all of them share."""
    split = [name.split(".") for name in names]
    keep = 1 if len(names) > 1 else 2  # parts that stay in any case
    shared, most = 0, min(map(len, split)) - keep
    while shared < most and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def _short(count: int | None) -> str:
    """Three digits and a unit: 28288354 -> "28.3M"."""
    if count is None:
        return ""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 0.9995 * size:  # what would round to 1000 of the unit below
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return str(count)


def _tiny(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


# How they are drawn


def _table(header: Row, rows: Sequence[Sequence[Any]], left: tuple[int, ...]) -> Any:
    """A rich table of `rows` without its empty columns; `left`: columns aligned to the left."""
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


def _align(rows: Sequence[Row], left: tuple[int, ...]) -> str:
    """Header and rows as text in columns without the empty ones."""
    used = [place for place in range(len(rows[0])) if any(row[place] for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in used}
    lines = []
    for row in rows:
        cells = (f"{row[p]:{'<' if p in left else '>'}{widths[p]}}" for p in used)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ascii_bar(density: float) -> str:
    return ("#" * round(density * BAR)).ljust(BAR, ".")


class _Bar:
    """Density as a bar: eighths of a cell where the terminal has them, else ASCII."""

    def __init__(self, density: float) -> None:
        self.density = density

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        whole, eighths = divmod(round(self.density * BAR * 8), 8)
        bar = "█" * whole + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")
        text = _ascii_bar(self.density) if options.ascii_only else bar.ljust(BAR)
        yield Text(text, style="cyan")

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        from rich.measure import Measurement

        return Measurement(BAR, BAR)
