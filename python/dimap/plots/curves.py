"""Accuracy against sparsity, one curve for each method."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA, VERSION = "dimap.accuracy", 1
DENSE = "dense"

# (colour, marker, dashes) of the methods that dimap knows, the same in every picture.
METHODS: dict[str, tuple[str, str, Any]] = {
    "dimap": (style.VERMILLION, "o", "-"),
    "lamp": (style.BLUE, "s", (0, (5, 1.5))),
    "uniform": (style.GREEN, "^", (0, (1, 1))),
    "global_magnitude": (style.ORANGE, "D", (0, (4, 1, 1, 1))),
    "taylor": (style.PURPLE, "v", (0, (6, 1, 1, 1, 1, 1))),
    "snip": (style.SKY, "P", (0, (2.5, 1.5))),
    "random": (style.GREY, "x", (0, (1, 2))),
}
SPARE = ((style.BLACK, "*", "-"), (style.BLACK, "h", (0, (3, 1))), (style.GREY, "d", "-"))


class Point(NamedTuple):
    """One method at one sparsity: the mean over its rows, and how far they spread."""

    sparsity: float
    accuracy: float
    spread: float


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
    panels = read_rows(rows)
    count = max(1, len(panels))
    figure = style.new_figure(style.WIDTH if count > 1 else 0.8 * style.WIDTH, 3.6)
    cells = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axes, (panel, curves) in zip(cells, panels.items(), strict=True):
        level = dense
        if level is None and DENSE in curves:
            level = curves[DENSE][0].accuracy
        if level is not None:
            axes.axhline(level, color=style.GREY, linewidth=1, zorder=1, label=DENSE)
        for name in (name for name in names if name in curves and name != DENSE):
            _draw(axes, name, curves[name], names)
        axes.set_xlabel("weights removed, %")
        axes.set_title(style.plain(panel), loc="left", fontsize=style.TEXT, color=style.INK)
        style.dress(axes)
    cells[0].set_ylabel(style.plain(ylabel))
    style.head(figure, title)
    handles: dict[str, Any] = {}
    for axes in cells:
        handles |= {label: h for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False,
        fontsize=style.TEXT - 0.5, handlelength=3.2, labelcolor=style.INK,
    )  # fmt: skip
    return style.finish(figure, path)


def _draw(axes: Axes, name: str, points: list[Point], names: list[str]) -> None:
    color, marker, dashes = _look(name, names)
    x, y = [100 * point.sparsity for point in points], [point.accuracy for point in points]
    if any(point.spread for point in points):
        low, high = ([p.accuracy + sign * p.spread for p in points] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    first = name.lower() == "dimap"
    axes.plot(
        x, y, color=color, marker=marker, linestyle=dashes, label=style.plain(name), markersize=4.5,
        linewidth=2.0 if first else 1.4, zorder=4 if first else 3,
    )  # fmt: skip


def _look(name: str, names: list[str]) -> tuple[str, str, Any]:
    """Colour, marker and dashes; a method that is not in METHODS gets a look that is left over."""
    if _key(name) in METHODS:
        return METHODS[_key(name)]
    used = {_key(other) for other in names}
    free = [*SPARE, *(look for method, look in METHODS.items() if method not in used)]
    others = [other for other in names if other != DENSE and _key(other) not in METHODS]
    return free[others.index(name) % len(free)]


def _key(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def read_rows(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
) -> dict[str, dict[str, list[Point]]]:
    """Check the rows and sum them up: panel -> method -> points by sparsity. Panel "" is no panel.

    Raises as `accuracy_curves`.
    """
    found: dict[str, dict[str, dict[float, list[tuple[float, float]]]]] = {}
    for number, row in enumerate(_list(rows)):
        where = f"rows[{number}]"
        if not isinstance(row, Mapping):
            raise TypeError(f"{where} must be a mapping, got {type(row).__name__}")
        method, panel = row.get("method"), row.get("panel", "")
        if not isinstance(method, str) or not method:
            raise ValueError(f"{where}['method'] must be the method's name, got {method!r}")
        if not isinstance(panel, str):
            raise ValueError(f"{where}['panel'] must be a string, got {panel!r}")
        dense = method == DENSE
        sparsity = _number(where, "sparsity", row.get("sparsity", 0.0 if dense else None), 1)
        accuracy = _number(where, "accuracy", row.get("accuracy"), 100)
        spread = row.get("spread")
        spread = 0.0 if spread is None else _number(where, "spread", spread, 100)
        points = found.setdefault(panel, {}).setdefault(method, {})
        points.setdefault(0.0 if dense else sparsity, []).append((accuracy, spread))
    if not found:
        raise ValueError("rows must hold at least one measurement, got none")
    return {
        panel: {name: [_point(s, points[s]) for s in sorted(points)] for name, points in ms.items()}
        for panel, ms in found.items()
    }


def _point(sparsity: float, values: list[tuple[float, float]]) -> Point:
    if len(values) == 1:
        return Point(sparsity, *values[0])
    accuracies = [accuracy for accuracy, _ in values]
    return Point(sparsity, statistics.fmean(accuracies), statistics.stdev(accuracies))


def _list(rows: Any) -> Sequence[Any]:
    if isinstance(rows, Mapping):
        got = (rows.get("schema"), rows.get("version"))
        if got != (SCHEMA, VERSION):
            raise ValueError(
                f"results must have schema {SCHEMA!r} and version {VERSION}, "
                f"got {got[0]!r} and {got[1]!r}"
            )
        rows = rows.get("rows")
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise TypeError(f"rows must be a list of mappings, got {type(rows).__name__}")
    return rows


def _number(where: str, key: str, value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}[{key!r}] must be a number, got {value!r}")
    if not 0 <= value <= most:  # nor a NaN
        raise ValueError(f"{where}[{key!r}] must be in [0, {most:g}], got {value}")
    return float(value)


def load_rows(path: str | os.PathLike[str]) -> Sequence[Mapping[str, Any]]:
    """The rows of a JSON file as `accuracy_curves` takes them.

    Raises OSError where it cannot be read, ValueError where it is not JSON or of another schema.
    """
    try:
        return _list(json.loads(Path(path).read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} must be a JSON file, got: {error}") from error
