"""Histograms of the weights, by layer type and block (Figure 2 of the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..groups import Choice, Layer, Patterns, position
from . import style
from .source import Source, kinds, place_name, source_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

BINS = 101  # in view; odd, so that zero is in the middle of one
VIEW = 3.5  # root mean squares to either side
MOST = 150  # bins to either side; what is further out is counted in the last one
Block = tuple["int | None", "int | None"]


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
    source = source_of(model, masks, patterns)
    spots = choose_blocks(source.layers, blocks)
    names = kinds(source.layers)
    cells = {(block_of(x), names[x.name]): x for x in source.layers if block_of(x) in spots}
    columns = list(dict.fromkeys(kind for _, kind in cells))
    modules = list(dict.fromkeys(layer.module for layer in source.layers))
    figure = style.new_figure(style.WIDTH, 0.75 + 1.15 * len(spots))
    grid = figure.subplots(len(spots), len(columns), sharex="col", squeeze=False)
    for column, kind in enumerate(columns):
        layers = [cells.get((spot, kind)) for spot in spots]
        view = max(VIEW * _rms(source, layer) for layer in layers if layer) or 1.0
        for axes, layer in zip(grid[:, column], layers, strict=True):
            if layer is None:
                axes.set_axis_off()
                continue
            _draw(axes, source, layer, view, style.module_color(layer.module, modules))
            if column == 0:
                axes.set_ylabel(place_name(layer).replace(", ", ",\n"))
            style.dress(axes, grid=None)
        grid[0][column].set_title(style.plain(kind), fontsize=style.TEXT, color=style.INK)
    figure.supxlabel("weight", fontsize=style.TEXT, color=style.INK)
    style.head(figure, title)
    return style.finish(figure, path)


def _draw(axes: Axes, source: Source, layer: Layer, view: float, color: str) -> None:
    """One panel, with BINS bins between -view and view."""
    edges, kept, pruned, weights = _count(source, layer, 2 * view / BINS)
    total = kept + pruned
    if pruned.any():
        axes.stairs(total.numpy(), edges.numpy(), fill=True, color=style.FAINT, label="pruned")
    axes.stairs(kept.numpy(), edges.numpy(), fill=True, color=color, label="kept")
    axes.set_xlim(-view, view)
    axes.set_ylim(0, 1.25 * max(1, int(total.max())))  # room for the words
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=3)
    if (left := int(kept.sum())) < weights:
        axes.text(
            0.98, 0.96, f"{100 * left / weights:.0f} % kept", transform=axes.transAxes,
            ha="right", va="top", fontsize=style.TEXT - 1.5, color=style.INK,
        )  # fmt: skip


def _count(source: Source, layer: Layer, width: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Edges [n + 1] of bins of one width around zero; the weights in them, kept [n] and pruned [n].

    Pruned weights that are gone, thus zero, are in none. Last, the number of all weights.
    """
    import torch

    kept, pruned, weights = [], [], 0  # of each weight its bin, 0 being the one around zero
    for name in layer.parameters:
        weight = source.weight(name).float().flatten()
        mask = source.mask(name).to(weight.device).flatten()
        weights += mask.numel()
        bins = (weight / width).round_().clamp_(-MOST, MOST).int()
        kept.append(bins[mask].cpu())
        pruned.append(bins[~mask & (weight != 0)].cpu())
    both = [torch.cat(kept), torch.cat(pruned)]
    side = max([BINS // 2, *(int(bins.abs().max()) for bins in both if len(bins))])
    counts = [torch.bincount(bins + side, minlength=2 * side + 1) for bins in both]
    edges = (torch.arange(2 * side + 2, dtype=torch.float64) - side - 0.5) * width
    return edges, counts[0], counts[1], weights


def _rms(source: Source, layer: Layer) -> float:
    """Root mean square of the weights that are not zero."""
    import torch

    energy, count = 0.0, 0
    for name in layer.parameters:
        weight = source.weight(name).float()
        count += int(weight.count_nonzero())
        energy += float(weight.square().sum(dtype=torch.float64))
    return float((energy / count) ** 0.5) if count else 0.0


def block_of(layer: Layer) -> Block:
    return layer.stage, layer.block


def choose_blocks(
    layers: Sequence[Layer], blocks: Sequence[int | tuple[int, int]] | None = None
) -> list[Block]:
    """The blocks to draw, checked; by default a few through the network."""
    spots: list[Block] = list(dict.fromkeys(map(block_of, sorted(layers, key=position))))
    if blocks is None:
        firsts: dict[int | None, Block] = {}
        for spot in spots:
            firsts.setdefault(spot[0], spot)
        if len(firsts) > 1:
            return list(firsts.values())[:4]
        return [spots[i] for i in sorted({round(k * (len(spots) - 1) / 3) for k in range(4)})]
    wanted = [block if isinstance(block, tuple) else (None, block) for block in blocks]
    for spot in wanted:
        if spot not in spots:
            raise ValueError(
                f"a block must be one of {', '.join(map(_written, spots))}, got {_written(spot)}"
            )
    return list(dict.fromkeys(wanted))


def _written(spot: Block) -> str:
    return ".".join(str(n) for n in spot if n is not None)
