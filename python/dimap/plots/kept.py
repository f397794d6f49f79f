"""The kept ratio of every layer, through the network (Figure 5 of the paper)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import _style as style
from ._source import LayerCount, counts_of, kinds, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..groups import Patterns

MARKERS = ("o", "s", "^", "v", "D", "P", "X", "d")
DASHES = ("-", (0, (3, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # of the kinds in one module
INSET = 0.9  # inches that axes lose to labels


def kept_ratios(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    patterns: Patterns | None = None,
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
    layers = counts_of(model, masks, patterns)
    if not layers:
        raise ValueError("the report must have a layer, got none")
    figure = style.new_figure(style.WIDTH, 3.3)
    axes = figure.add_subplot()
    weights, kept = sum(layer.weights for layer in layers), sum(layer.kept for layer in layers)
    share = 100 * kept / weights if weights else 100.0
    axes.axhline(share, color=style.GREY, linewidth=1, label=f"all: {share:.1f} %", zorder=1)
    blocks = all(layer.block is not None for layer in layers)
    spots = sorted({place(layer) for layer in layers})
    modules = list(dict.fromkeys(layer.module for layer in layers))
    by_kind = _by_kind(layers)
    room = (style.WIDTH - INSET) / max(len(spots) if blocks else len(layers), 1)  # inches a block
    for number, (kind, members) in enumerate(by_kind.items()):
        module = members[0].module
        order = [k for k, others in by_kind.items() if others[0].module == module].index(kind)
        # The layers of a block stand side by side, so that equal ones do not hide each other.
        aside = 0.8 * ((number + 0.5) / len(by_kind) - 0.5) if blocks else 0.0
        starts = [spots.index(place(x)) for x in members] if blocks else range(len(members))
        color = style.module_color(module, modules)
        axes.plot(
            [start + aside for start in starts],
            [100 * layer.kept / layer.weights if layer.weights else 100.0 for layer in members],
            color=color,
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor=color if order % 2 == 0 else "white",
            linestyle=DASHES[order % len(DASHES)],
            label=style.plain(kind if module in kind else f"{module}: {kind}"),
            linewidth=0.7,
            markersize=min(5.0, max(3.0, 72 * room * 0.8 / len(by_kind))),
            zorder=3,
        )
    axes.set_ylim(-3, 103)
    axes.set_ylabel("weights kept, %")
    if blocks:
        _mark_blocks(axes, [(layer.stage, layer.block) for layer in _firsts(layers)], room)
    else:
        axes.set_xlabel("layer")
    style.dress(axes)
    if title:
        axes.set_title(style.plain(title), fontsize=style.TEXT + 1, color=style.INK)
    figure.legend(
        loc="outside upper center", ncols=min(6, len(by_kind) + 1), frameon=False,
        fontsize=style.TEXT - 0.5, handlelength=2.6, columnspacing=1.4, labelcolor=style.INK,
    )  # fmt: skip
    return style.finish(figure, path)


def _by_kind(layers: Sequence[LayerCount]) -> dict[str, list[LayerCount]]:
    """Kind -> its layers through the network; kinds of one module stand together."""
    names = kinds(list(layers))
    order = {module: i for i, module in enumerate(dict.fromkeys(x.module for x in layers))}
    found: dict[str, list[LayerCount]] = defaultdict(list)
    for layer in sorted(layers, key=lambda layer: order[layer.module]):
        found[names[layer.name]].append(layer)
    return dict(found)


def _firsts(layers: Sequence[LayerCount]) -> list[LayerCount]:
    return [next(members) for _, members in groupby(layers, key=place)]


def _mark_blocks(axes: Axes, spots: Sequence[tuple[int | None, int | None]], room: float) -> None:
    """Block numbers under the axis, as many as there is room for; stages below and between them."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * room >= 0.22)
    shown = [i for i, (_, block) in enumerate(spots) if (block or 0) % every == 0]
    axes.set_xticks(shown, [str(spots[i][1]) for i in shown])
    axes.set_xlim(-0.7, len(spots) - 0.3)
    stages = [stage for stage, _ in spots]
    if set(stages) == {None}:
        axes.set_xlabel("block")
        return
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage != stages[i - 1]]
    ends = [*starts[1:], len(stages)]
    narrow = min(end - start for start, end in zip(starts, ends, strict=True)) * room < 0.5
    for start, end in zip(starts, ends, strict=True):
        if start:
            axes.axvline(start - 0.5, color=style.GREY, linewidth=0.6, alpha=0.6, zorder=0)
        axes.annotate(
            str(stages[start]) if narrow else f"stage {stages[start]}",
            ((start + end - 1) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -17),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=style.TEXT - 1,
            color=style.INK,
        )
    axes.set_xlabel("block; below it, the stage" if narrow else "block", labelpad=14)
