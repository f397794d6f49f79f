"""What `dimap.bench` measured: the time of a weight, by job."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..bench import Bench


@style.looking()
def bench_times(bench: Bench, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw how long each job takes for one weight: a bar on a logarithmic scale.

    bench: of `dimap.bench.bench`. A thin line spans eight in ten of a job's rounds; behind each bar
        stands how many times as long as a copy of the weights it takes.
    path: where to write, .png or .svg; None writes nothing. Returns the matplotlib Figure.
    """
    style.check_path(path)
    from matplotlib.figure import Figure

    rows = list(reversed(bench.rows))  # the first one stands on top
    figure = Figure(figsize=(style.WIDTH, 0.9 + 0.32 * len(rows)))
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.grid(visible=True, axis="x")
    slowest = max(row.nanoseconds for row in rows)
    for place, row in enumerate(rows):
        words = row.job.split()
        color = style.ORANGE if words[0] in ("plain", "torch") else style.BLUE
        color = style.GREY if row.job == "copy" else color
        axes.barh(place, row.nanoseconds, height=0.62, color=color)
        times = sorted(seconds / row.weights * 1e9 for seconds in row.timing.seconds)
        low, high = (times[round(share * (len(times) - 1))] for share in (0.1, 0.9))
        axes.hlines(place, low, high, color=style.INK, linewidth=1)
        label = f" {row.nanoseconds:.3g} ns"
        label += "" if row.job == "copy" else f", {row.beside_copy[0]:.3g} ×"
        axes.text(max(row.nanoseconds, high), place, label, va="center")
    axes.set_yticks(range(len(rows)), [row.job for row in rows])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(right=slowest * 6)  # room for the words
    axes.set_xlabel("nanoseconds a weight; × is beside a copy of the weights")
    count = bench.rows[0].weights / 1e6
    where = (
        bench.machine.get("gpu") or f"{bench.machine['cpu']}, {bench.machine['threads']} threads"
    )
    axes.set_title(f"{bench.source}, {count:.1f} M weights, {bench.dtype}: {where}", loc="left")
    return style.finish(figure, path)
