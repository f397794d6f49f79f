"""Accuracy against sparsity, one curve for each method."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..report.report import check_schema
from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA, VERSION = "dimap.accuracy", 1
DENSE = "dense"

Look: TypeAlias = "tuple[str, str, Any]"  # colour, marker, dashes

# Of the methods that dimap knows, the same in every picture.
METHODS: dict[str, Look] = {
    "dimap": (style.VERMILLION, "o", "-"),
    "lamp": (style.BLUE, "s", (0, (5, 1.5))),
    "uniform": (style.GREEN, "^", (0, (1, 1))),
    "global_magnitude": (style.ORANGE, "D", (0, (4, 1, 1, 1))),
    "taylor": (style.PURPLE, "v", (0, (6, 1, 1, 1, 1, 1))),
    "wanda": (style.INK, "*", (0, (3, 1))),
    "snip": (style.SKY, "P", (0, (2.5, 1.5))),
    "random": (style.GREY, "x", (0, (1, 2))),
}
SPARE = ((style.INK, "p", "-"), (style.INK, "h", (0, (3, 1))), (style.GREY, "d", "-"))


class Point(NamedTuple):
    """One method at one sparsity: the mean over its rows, and how far they spread."""

    sparsity: float
    accuracy: float
    spread: float


@style.looking()
def accuracy_curves(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    dense: float | None = None,
    title: str | None = None,
    ylabel: str = "accuracy, %",
) -> Figure:
    """Draw accuracy against sparsity, one curve for each method, with its spread as a band.

    rows: one mapping for each measurement, or {"schema": "dimap.accuracy", "version": 1, "rows":
        [...]} with such a list in it (the file of `dimap plot accuracy`):

            method    its name; "dense" is drawn as a level line, whatever its sparsity
            sparsity  share of the weights that is removed, in [0, 1]
            accuracy  in percent: one seed's, or a mean of several
            spread    optional: standard deviation in points of percent
            seed      optional: rows of the same method and sparsity become one point, their mean,
                      with their sample standard deviation for a spread
            panel     optional: rows of one panel are drawn beside those of another ("one shot",
                      "fine-tuned"), on the same scales

        Other entries are left alone. Methods and panels stand in the order of their first rows.
    path: where to write, .png or .svg; None writes nothing.
    dense: accuracy of the dense model, drawn as a level line in every panel.

    Returns the matplotlib Figure. Raises ValueError or TypeError that name the row and the entry.
    """
    style.check_path(path)
    from matplotlib.figure import Figure

    panels = read_rows(rows)
    looks = choose_looks(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(style.WIDTH if len(panels) > 1 else 0.8 * style.WIDTH, 3.6))
    cells = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (panel, curves) in zip(cells, panels.items(), strict=True):
        level = curves[DENSE][0].accuracy if dense is None and DENSE in curves else dense
        if level is not None:
            axes.axhline(level, color=style.GREY, linewidth=1, zorder=1, label=DENSE)
        for name in (name for name in looks if name in curves):
            _draw(axes, name, curves[name], looks[name])
        axes.set_xlabel("weights removed, %")
        axes.set_title(panel, loc="left")
        axes.grid(axis="y")
    cells[0].set_ylabel(ylabel)
    if title:
        figure.suptitle(title)
    drawn = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in cells]
    handles = {label: handle for pairs in drawn for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return style.finish(figure, path)


def _draw(axes: Axes, name: str, points: list[Point], look: Look) -> None:
    color, marker, dashes = look
    x, y = [100 * point.sparsity for point in points], [point.accuracy for point in points]
    if any(point.spread for point in points):
        low, high = ([p.accuracy + sign * p.spread for p in points] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    width, above = (2.0, 4) if name.lower() == "dimap" else (1.4, 3)
    axes.plot(
        x, y, color=color, marker=marker, linestyle=dashes, label=name, linewidth=width, zorder=above
    )  # fmt: skip


def choose_looks(names: Iterable[str]) -> dict[str, Look]:
    """How each method looks; one that is not in METHODS gets a look that is left over."""
    keys = {n: n.lower().replace(" ", "_").replace("-", "_") for n in names if n != DENSE}
    left = (look for method, look in METHODS.items() if method not in keys.values())
    free = cycle([*SPARE, *left])
    return {name: METHODS.get(key) or next(free) for name, key in keys.items()}


def read_rows(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
) -> dict[str, dict[str, list[Point]]]:
    """Check the rows and sum them up: panel -> method -> points by sparsity. Panel "" is no panel.

    Raises as `accuracy_curves`.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for number, row in enumerate(_list(rows)):
        where = f"rows[{number}]"
        if not isinstance(row, Mapping):
            raise TypeError(f"{where} must be a mapping, got {type(row).__name__}")
        method, panel = row.get("method"), row.get("panel", "")
        if not isinstance(method, str) or not method:
            raise ValueError(f"{where}['method'] must be the method's name, got {method!r}")
        if not isinstance(panel, str):
            raise ValueError(f"{where}['panel'] must be a string, got {panel!r}")
        point = Point(*(_number(where, row, key) for key in Point._fields))
        if method == DENSE:
            point = point._replace(sparsity=0.0)
        found.setdefault(panel, {}).setdefault(method, []).append(point)
    if not found:
        raise ValueError("rows must hold at least one measurement, got none")
    return {
        panel: {name: _means(points) for name, points in curves.items()}
        for panel, curves in found.items()
    }


def _means(points: list[Point]) -> list[Point]:
    """One point for each sparsity."""
    means = []
    for sparsity, group in groupby(sorted(points), lambda point: point.sparsity):
        seeds = list(group)
        if len(seeds) > 1:
            values = [point.accuracy for point in seeds]
            seeds = [Point(sparsity, statistics.fmean(values), statistics.stdev(values))]
        means += seeds
    return means


def _list(rows: Any) -> Sequence[Any]:
    if isinstance(rows, Mapping):
        check_schema("results", rows, SCHEMA, VERSION)
        rows = rows.get("rows")
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise TypeError(f"rows must be a list of mappings, got {type(rows).__name__}")
    return rows


def _number(where: str, row: Mapping[str, Any], key: str) -> float:
    value, most = row.get(key), 1 if key == "sparsity" else 100
    if value is None and (key == "spread" or (key == "sparsity" and row["method"] == DENSE)):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}[{key!r}] must be a number, got {value!r}")
    if not 0 <= value <= most:  # nor a NaN
        raise ValueError(f"{where}[{key!r}] must be in [0, {most}], got {value}")
    return float(value)


def load_rows(path: str | os.PathLike[str]) -> Sequence[Mapping[str, Any]]:
    """The rows of a JSON file as `accuracy_curves` takes them.

    Raises OSError where it cannot be read, ValueError where it is not JSON or of another schema.
    """
    try:
        return _list(json.loads(Path(path).read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} must be a JSON file, got: {error}") from error
