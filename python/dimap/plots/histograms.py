"""Histograms of the weights, by layer type and block (Figure 2 of the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _style as style
from ._source import Source, kinds, place, place_name, source_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..groups import Layer, Patterns

BINS = 101  # in view; odd, so that zero is in the middle of one
VIEW = 3.5  # root mean squares to either side
MOST = 150  # bins to either side; what is further out is counted in the last one
Block = tuple["int | None", "int | None"]


@dataclass(frozen=True)
class Histogram:
    """Counts of one layer's weights in bins of one width around zero.

    edges: [n + 1]. kept, pruned: [n]; `pruned` is all zero where pruned weights are gone.
    """

    edges: np.ndarray[Any, Any]
    kept: np.ndarray[Any, Any]
    pruned: np.ndarray[Any, Any]
    weights: int
    share: float  # of the weights that are kept


def weight_histograms(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    blocks: Sequence[int | tuple[int, int]] | None = None,
    patterns: Patterns | None = None,
    title: str | None = None,
) -> Figure:
    """Draw histograms of the weights: one column for each type of layer, one row for each block.

    model: a `dimap.Pruning`, an open checkpoint, an nn.Module or a state dict.
    masks: parameter name -> bool tensor, True = kept. With them and the dense weights, the picture
        shows what is pruned (grey) under what is kept (in the module's colour); without them the
        weights that are not zero.
    blocks: (stage, block), or the block's number in a model without stages; by default the first
        of each stage, or four through the network.
    path: where to write, .png or .svg; None writes nothing.

    Returns the matplotlib Figure. Every panel has its own height; columns share the range of
    weights, 3.5 root mean squares of their widest layer, and rare larger weights are out of view.
    Reads one tensor at a time. Raises ValueError for a block that the model does not have.
    """
    style.check_path(path)
    source = source_of(model, masks, patterns)
    spots = choose_blocks(source.layers, blocks)
    names = kinds(source.layers)
    columns = list(dict.fromkeys(names[x.name] for x in source.layers if spot_of(x) in spots))
    cells = {(spot_of(x), names[x.name]): x for x in source.layers if spot_of(x) in spots}
    modules = list(dict.fromkeys(layer.module for layer in source.layers))
    figure = style.new_figure(style.WIDTH, 0.75 + 1.15 * len(spots))
    grid = figure.subplots(len(spots), len(columns), sharex="col", squeeze=False)
    for column, kind in enumerate(columns):
        layers = {spot: cells[spot, kind] for spot in spots if (spot, kind) in cells}
        view = max(VIEW * _rms(source, layer) for layer in layers.values()) or 1.0
        for row, spot in enumerate(spots):
            axes = grid[row][column]
            if spot not in layers:
                axes.set_axis_off()
                continue
            layer = layers[spot]
            color = style.module_color(layer.module, modules)
            _draw(axes, histogram(source, layer, view), view, color)
            if column == 0:
                axes.set_ylabel(place_name(*spot).replace(", ", ",\n"))
            style.dress(axes, grid=None)
        grid[0][column].set_title(style.plain(kind), fontsize=style.TEXT, color=style.INK)
    figure.supxlabel("weight", fontsize=style.TEXT, color=style.INK)
    if title:
        figure.suptitle(style.plain(title), fontsize=style.TEXT + 1, color=style.INK)
    return style.finish(figure, path)


def _draw(axes: Axes, drawn: Histogram, view: float, color: str) -> None:
    total = drawn.kept + drawn.pruned
    if drawn.pruned.any():
        axes.stairs(total, drawn.edges, fill=True, color=style.FAINT, label="pruned")
    axes.stairs(drawn.kept, drawn.edges, fill=True, color=color, label="kept")
    axes.set_xlim(-view, view)
    axes.set_ylim(0, 1.25 * max(1, int(total.max())))  # room for the words
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=3)
    if drawn.share < 1:
        axes.text(
            0.98, 0.96, f"{100 * drawn.share:.0f} % kept", transform=axes.transAxes,
            ha="right", va="top", fontsize=style.TEXT - 1.5, color=style.INK,
        )  # fmt: skip


def histogram(source: Source, layer: Layer, view: float) -> Histogram:
    """Count one layer's weights, BINS of them between -view and view."""
    width = 2 * view / BINS
    places: tuple[list[Tensor], list[Tensor]] = (
        [],
        [],
    )  # of kept and of pruned weights; 0: around zero
    weights = kept = 0
    for name in layer.parameters:
        weight = source.weight(name).float().flatten()
        mask = source.mask(name).to(weight.device).flatten()
        where = (weight / width).round_().clamp_(-MOST, MOST).int()
        places[0].append(where[mask].cpu())
        places[1].append(where[~mask & (weight != 0)].cpu())
        weights += mask.numel()
        kept += len(places[0][-1])
    both = [torch.cat(part) for part in places]
    side = max([BINS // 2, *(int(part.abs().max()) for part in both if len(part))])
    counts = [torch.bincount(part + side, minlength=2 * side + 1).numpy() for part in both]
    edges = (np.arange(2 * side + 2) - side - 0.5) * width
    return Histogram(edges, counts[0], counts[1], weights, kept / weights if weights else 1.0)


def _rms(source: Source, layer: Layer) -> float:
    """Root mean square of the weights that are not zero."""
    energy, count = 0.0, 0
    for name in layer.parameters:
        weight = source.weight(name)
        energy += float(weight.float().square().sum(dtype=torch.float64))
        count += int(weight.count_nonzero())
    return float((energy / count) ** 0.5) if count else 0.0


def spot_of(layer: Layer) -> Block:
    return layer.stage, layer.block


def choose_blocks(
    layers: Sequence[Layer], blocks: Sequence[int | tuple[int, int]] | None = None
) -> list[Block]:
    """The blocks to draw, checked; by default a few through the network."""
    spots: list[Block] = list(dict.fromkeys(map(spot_of, sorted(layers, key=place))))
    if blocks is None:
        stages = {stage for stage, _ in spots}
        if len(stages) > 1:
            firsts = [next(spot for spot in spots if spot[0] == stage) for stage in stages]
            return sorted(firsts, key=spots.index)[:4]
        return [spots[i] for i in sorted({round(k * (len(spots) - 1) / 3) for k in range(4)})]
    wanted = [block if isinstance(block, tuple) else (None, block) for block in blocks]
    for spot in wanted:
        if spot not in spots:
            have = ", ".join(".".join(str(n) for n in s if n is not None) for s in spots)
            got = ".".join(str(n) for n in spot if n is not None)
            raise ValueError(f"a block must be one of {have}, got {got}")
    return list(dict.fromkeys(wanted))
