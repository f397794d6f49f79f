"""What each module loses if it alone is pruned, against its sparsity."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..sensitivity import Sensitivity


@style.looking()
def sensitivity_curves(
    found: Sensitivity, path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw the distortion of each module, its layers as fine lines, and accuracy where it was measured.

    found: of `dimap.measure_sensitivity`. path: where to write, .png or .svg; None writes nothing.

    Returns the matplotlib Figure.
    """
    style.check_path(path)
    from matplotlib.figure import Figure

    measured = found.accuracy
    figure = Figure(figsize=(style.WIDTH if measured else 0.8 * style.WIDTH, 3.6))
    cells = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    names = [curve.name for curve in found.modules]
    colors = style.module_colors(names)
    markers = dict(zip(names, "os^vDPX" * len(names), strict=False))
    x = [100 * s for s in found.sparsities]
    for curve in found.layers:
        y = [100 * d for d in curve.distortion]
        cells[0].plot(x, y, color=colors[curve.module], linewidth=0.5, alpha=0.35, zorder=2)
    for curve in found.modules:
        y = [100 * d for d in curve.distortion]
        cells[0].plot(
            x, y, color=colors[curve.name], marker=markers[curve.name], markevery=10,
            label=curve.name, linewidth=2, zorder=3,
        )  # fmt: skip
    cells[0].set_ylabel("relative Frobenius distortion, %")
    if measured:
        x = [100 * s for s in measured["sparsities"]]
        cells[1].axhline(measured["dense"], color=style.GREY, linewidth=1, label="dense")
        for name, values in measured["modules"].items():
            cells[1].plot(x, values, color=colors[name], marker=markers[name])
        cells[1].set_ylabel("top-1, %, that module alone pruned")
    for axes in cells:
        axes.set_xlabel("weights of the module or layer removed, %")
        axes.grid(axis="y")
    if title:
        figure.suptitle(title)
    cells[0].legend(loc="upper left")
    return style.finish(figure, path)
