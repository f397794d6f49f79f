"""Histograms of the weights, by layer type and block (Figure 2 of the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..groups import Choice, Layer, Patterns, position
from . import style
from .source import Source, kinds, place_name, source_of, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

BINS = 101  # in view; odd, so that zero is in the middle of one
VIEW = 3.5  # root mean squares to either side
Block = tuple[str, "int | None", "int | None"]  # tower, stage, block
MOST = 12  # columns: of many experts, a few


@style.looking()
def weight_histograms(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    blocks: Sequence[int | tuple[int, int]] | None = None,
    patterns: Patterns | Choice | None = None,
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
    from matplotlib.figure import Figure

    source = source_of(model, masks, patterns)
    spots = choose_blocks(source.layers, blocks)
    names = kinds(source.layers)
    cells = {(block_of(x), names[x.name]): x for x in source.layers if block_of(x) in spots}
    columns = list(dict.fromkeys(kind for _, kind in cells))
    columns = columns if len(columns) <= MOST else spread(columns, MOST)
    colors = style.module_colors(layer.module for layer in source.layers)
    figure = Figure(figsize=(style.WIDTH, 0.75 + 1.15 * len(spots)))
    grid = figure.subplots(len(spots), len(columns), sharex="col", squeeze=False)
    for kind, column in zip(columns, grid.T, strict=True):
        column[0].set_title(kind)
        layers = [cells.get((spot, kind)) for spot in spots]
        view = max(VIEW * _rms(source, layer) for layer in layers if layer) or 1.0
        for axes, layer in zip(column, layers, strict=True):
            if layer is None:
                axes.set_axis_off()
                continue
            _draw(axes, source, layer, view, colors[layer.module])
            if kind == columns[0]:
                axes.set_ylabel(place_name(layer, ",\n"))
    figure.supxlabel("weight", fontsize=style.TEXT)
    if title:
        figure.suptitle(title)
    return style.finish(figure, path)


def _draw(axes: Axes, source: Source, layer: Layer, view: float, color: str) -> None:
    """One panel: BINS bins between -view and view, and one to either side for what is out of view.

    Pruned weights that are gone, thus zero, are in none.
    """
    import numpy as np

    end = view * (1 + 2 / BINS)
    edges = np.linspace(-end, end, BINS + 3)
    kept, pruned, weights = np.zeros(BINS + 2, int), np.zeros(BINS + 2, int), 0
    for name in layer.parameters:
        weight = source.weight(name).float().flatten().cpu()
        mask = source.mask(name).flatten().cpu()
        weights += len(mask)
        for counts, chosen in ((kept, mask), (pruned, ~mask & (weight != 0))):
            values = weight[chosen].double().clamp(-end, end).numpy()
            counts += np.histogram(values, BINS + 2, (-end, end))[0]
    total = kept + pruned
    if pruned.any():
        axes.stairs(total, edges, fill=True, color=style.FAINT, label="pruned")
    axes.stairs(kept, edges, fill=True, color=color, label="kept")
    axes.set_xlim(-view, view)
    axes.set_ylim(0, 1.25 * max(1, total[1:-1].max()))  # room for the words
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=3)
    if (left := kept.sum()) < weights:
        axes.text(
            0.98, 0.96, f"{100 * left / weights:.0f} % kept", transform=axes.transAxes,
            ha="right", va="top", fontsize=style.TEXT - 1.5,
        )  # fmt: skip


def _rms(source: Source, layer: Layer) -> float:
    """Root mean square of the weights that are not zero."""
    import torch

    energy, count = 0.0, 0
    for name in layer.parameters:
        weight = source.weight(name).float()
        count += int(weight.count_nonzero())
        energy += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    return float((energy / count) ** 0.5) if count else 0.0


def block_of(layer: Layer) -> Block:
    return layer.tower, layer.stage, layer.block


def choose_blocks(
    layers: Sequence[Layer], blocks: Sequence[int | tuple[int, int]] | None = None
) -> list[Block]:
    """The blocks to draw, checked; by default a few through the network."""
    spots: list[Block] = list(dict.fromkeys(map(block_of, sorted(layers, key=position))))
    if blocks is None:
        firsts = [next(stage) for _, stage in groupby(spots, lambda spot: spot[:2])]
        return firsts[:4] if len(firsts) > 1 else spread(spots, 4)
    wanted: dict[Block, None] = {}
    for block in blocks:
        where = block if isinstance(block, tuple) else (None, block)
        found = [spot for spot in spots if spot[1:] == where]  # one in every tower
        if not found:
            known = ", ".join(dict.fromkeys(_written(spot) for spot in spots))
            raise ValueError(f"a block must be one of {known}, got {_written(('', *where))}")
        wanted |= dict.fromkeys(found)
    return list(wanted)


def _written(spot: Block) -> str:
    return ".".join(str(n) for n in spot[1:] if n is not None)
