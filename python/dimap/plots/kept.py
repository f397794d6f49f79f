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
    layers = counts_of(model, masks, patterns)
    if not layers:
        raise ValueError("the report must have a layer, got none")
    figure = style.new_figure(style.WIDTH, 3.3)
    axes = figure.add_subplot()
    weights, kept = sum(layer.weights for layer in layers), sum(layer.kept for layer in layers)
    share = 100 * kept / weights if weights else 100.0
    axes.axhline(share, color=style.GREY, linewidth=1, label=f"all: {share:.1f} %", zorder=1)
    blocks = all(layer.block is not None for layer in layers)
    spots = [position(layer) for layer in _firsts(layers)]
    modules = list(dict.fromkeys(layer.module for layer in layers))
    by_kind = _by_kind(layers, modules)
    room = (style.WIDTH - INSET) / len(spots if blocks else layers)  # inches a block
    for number, (kind, members) in enumerate(by_kind.items()):
        module = members[0].module
        order = [k for k, others in by_kind.items() if others[0].module == module].index(kind)
        # The layers of a block stand side by side, so that equal ones do not hide each other.
        aside = 0.8 * ((number + 0.5) / len(by_kind) - 0.5) if blocks else 0.0
        starts = [spots.index(position(x)) for x in members] if blocks else range(len(members))
        color = style.module_color(module, modules)
        axes.plot(
            [start + aside for start in starts], [100 * layer.density for layer in members],
            label=style.plain(kind if module in kind else f"{module}: {kind}"),
            color=color, linestyle=DASHES[order % len(DASHES)], linewidth=0.7, zorder=3,
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor=color if order % 2 == 0 else "white",
            markersize=min(5.0, max(3.0, 72 * room * 0.8 / len(by_kind))),
        )  # fmt: skip
    axes.set_ylim(-3, 103)
    axes.set_ylabel("weights kept, %")
    if blocks:
        _mark_blocks(axes, _firsts(layers), room)
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


def _by_kind(layers: Sequence[LayerReport], modules: list[str]) -> dict[str, list[LayerReport]]:
    """Kind -> its layers through the network; kinds of one module stand together."""
    names = kinds(layers)
    found: dict[str, list[LayerReport]] = {}
    for layer in sorted(layers, key=lambda layer: modules.index(layer.module)):
        found.setdefault(names[layer.name], []).append(layer)
    return found


def _firsts(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """The first layer of each block."""
    return [next(members) for _, members in groupby(layers, key=position)]


def _mark_blocks(axes: Axes, firsts: Sequence[LayerReport], room: float) -> None:
    """Block numbers under the axis, as many as there is room for; stages below and between them."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * room >= 0.22)
    shown = [i for i, layer in enumerate(firsts) if (layer.block or 0) % every == 0]
    axes.set_xticks(shown, [str(firsts[i].block) for i in shown])
    axes.set_xlim(-0.7, len(firsts) - 0.3)
    stages = [layer.stage for layer in firsts]
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
            ((start + end - 1) / 2, 0), xycoords=("data", "axes fraction"),
            xytext=(0, -17), textcoords="offset points", ha="center", va="top",
            fontsize=style.TEXT - 1, color=style.INK,
        )  # fmt: skip
    axes.set_xlabel("block; below it, the stage" if narrow else "block", labelpad=14)
