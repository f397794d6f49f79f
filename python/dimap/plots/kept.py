"""The kept ratio of every layer, through the network (Figure 5 of the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..groups import Choice, Patterns, position
from ..report import LayerReport
from . import style
from .source import counts_of, kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

MARKERS = ("o", "s", "^", "v", "D", "P", "X", "d")
DASHES = ("-", (0, (3, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # of the kinds in one module
INSET = 0.9  # inches that axes lose to labels


@style.looking()
def kept_ratios(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    patterns: Patterns | Choice | None = None,
    title: str | None = None,
) -> Figure:
    """Draw how much each layer keeps, block after block, coloured by module.

    model: a `dimap.report.Report` or a `dimap.Pruning`; or an open checkpoint, an nn.Module or a
        state dict, of which pruned weights are zero, or as `masks` say.
    masks: parameter name -> bool tensor, True = kept.
    path: where to write, .png or .svg; None writes nothing.

    Returns the matplotlib Figure. The level line is the share of all prunable weights.
    Reads one tensor at a time. Raises TypeError or ValueError as `dimap.find_modules`, and
    ValueError where masks are of another model.
    """
    style.check_path(path)
    from matplotlib.figure import Figure

    layers = counts_of(model, masks, patterns)
    if not layers:
        raise ValueError("the report must have a layer, got none")
    figure = Figure(figsize=(style.WIDTH, 3.3))
    axes = figure.add_subplot(ylim=(-3, 103), ylabel="weights kept, %")
    axes.grid(axis="y")
    weights, kept = sum(layer.weights for layer in layers), sum(layer.kept for layer in layers)
    share = 100 * kept / weights if weights else 100.0
    axes.axhline(share, color=style.GREY, linewidth=1, label=f"all: {share:.1f} %", zorder=1)
    firsts = [next(members) for _, members in groupby(layers, key=position)]
    blocks = all(layer.block is not None for layer in layers)
    spots = {position(layer): number for number, layer in enumerate(firsts)}
    room = (style.WIDTH - INSET) / len(firsts if blocks else layers)  # inches a block
    colors = style.module_colors(layer.module for layer in layers)
    names = kinds(layers)
    by_kind: dict[str, list[LayerReport]] = {}  # those of one module stand together
    for layer in sorted(layers, key=lambda layer: list(colors).index(layer.module)):
        by_kind.setdefault(names[layer.name], []).append(layer)
    seen: list[str] = []
    for number, (kind, members) in enumerate(by_kind.items()):
        module = members[0].module
        nth = seen.count(module)  # of its module
        seen.append(module)
        # The layers of a block stand side by side, so that equal ones do not hide each other.
        aside = 0.8 * ((number + 0.5) / len(by_kind) - 0.5)
        axes.plot(
            [spots[position(x)] + aside for x in members] if blocks else range(len(members)),
            [100 * layer.density for layer in members],
            label=kind if module in kind else f"{module}: {kind}",
            color=colors[module], linestyle=DASHES[nth % len(DASHES)], linewidth=0.7, zorder=3,
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor=style.PAPER if nth % 2 else colors[module],
            markersize=min(5.0, max(3.0, 72 * room * 0.8 / len(by_kind))),
        )  # fmt: skip
    if blocks:
        _mark_blocks(axes, firsts, room)
    else:
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)
    axes.set_title(title or "", fontsize=style.TEXT + 1)
    labels = axes.get_legend_handles_labels()[1]
    wide = max(map(style.width_of, labels)) + 0.7  # inches, with its line and what is between
    columns = min(6, len(labels), max(1, int(style.WIDTH / wide)))
    figure.legend(loc="outside upper center", ncols=columns, columnspacing=1.4)
    return style.finish(figure, path)


def _mark_blocks(axes: Axes, firsts: Sequence[LayerReport], room: float) -> None:
    """Block numbers under the axis, as many as there is room for; stages below and between them.

    firsts: the first layer of each block. room: inches a block.
    """
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * room >= 0.22)
    shown = [i for i, layer in enumerate(firsts) if (layer.block or 0) % every == 0]
    axes.set_xticks(shown, [str(firsts[i].block) for i in shown])
    axes.set_xlim(-0.7, len(firsts) - 0.3)
    stages = [(stage, len(list(blocks))) for stage, blocks in groupby(firsts, lambda x: x.stage)]
    if stages[0][0] is None:
        axes.set_xlabel("block")
        return
    narrow = min(blocks for _, blocks in stages) * room < 0.5
    axes.set_xlabel("block; below it, the stage" if narrow else "block", labelpad=14)
    start = -0.5
    for stage, blocks in stages:
        axes.annotate(
            str(stage) if narrow else f"stage {stage}", (start + blocks / 2, 0),
            xycoords=("data", "axes fraction"), xytext=(0, -17), textcoords="offset points",
            ha="center", va="top", fontsize=style.TEXT - 1,
        )  # fmt: skip
        start += blocks
        if start < len(firsts) - 1:
            axes.axvline(start, color=style.GREY, linewidth=0.6, alpha=0.6, zorder=0)
