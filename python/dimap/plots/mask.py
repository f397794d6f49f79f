"""A layer's mask as a picture, with query, key and value marked (Figure 6 of the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .._errors import near
from ..groups import Choice, Layer, Patterns
from . import style
from .source import Source, source_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

KEPT, PRUNED = style.VERMILLION, style.FAINT
ROLES = ("query", "key", "value")
# The last part of a tensor's name -> the parts of a layer that are stacked in it, equal in size.
STACKED = {
    "qkv": ROLES, "in_proj_weight": ROLES, "kv": ROLES[1:],
    "q": ROLES[:1], "q_proj": ROLES[:1], "query": ROLES[:1],
    "k": ROLES[1:2], "k_proj": ROLES[1:2], "key": ROLES[1:2],
    "v": ROLES[2:], "v_proj": ROLES[2:], "value": ROLES[2:],
}  # fmt: skip
# Families whose fused tensors go head by head, or whose parts are not of one size.
MIXED = ("coatnet", "convit", "efficientformer", "focalnet", "levit", "maxvit")

ACROSS, TALL = 880, 460  # pixels that matrices may take, all of them side by side
LARGEST = 16  # pixels a weight
EDGE, GAP, LINE, BOTTOM = 34, 16, 24, 32  # pixels around them; a line of words above
NARROWEST = 480  # pixels of a picture, for the words below


class Part(NamedTuple):
    """A matrix to draw: a tensor's mask, or its query's, key's or value's share of it."""

    name: str
    mask: Tensor  # bool, [rows, columns] as drawn

    def words(self) -> str:
        return f"{self.name} {_percent([self])} kept"


@style.looking()
def mask_picture(
    model: Any,
    layer: str,
    path: str | os.PathLike[str] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    patterns: Patterns | Choice | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a layer's mask: kept weights in colour, pruned ones in grey.

    model, masks: as in `weight_histograms`.
    layer: its name as in reports, or the name of one of its parameters.
    path: where to write, .png or .svg; None writes nothing.
    title: instead of the layer's name and kept share.

    A row is an output feature; of matrices taller than wide, a column is. Query, key and value
    stand side by side, whether fused or split. A weight is a square of whole pixels; a matrix of
    more weights than there is room for is averaged, and a pixel's tint is the share that is kept
    in its area.

    Returns the matplotlib Figure. Raises ValueError for a layer that the model does not have.
    """
    style.check_path(path)
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    source = source_of(model, masks, patterns)
    found = find_layer(source, layer)
    parts = [part for name in found.parameters for part in _parts(source, name)]
    rows, columns = "output feature", "input feature"
    if any(part.mask.shape[0] > 1.2 * part.mask.shape[1] for part in parts):
        parts = [Part(part.name, part.mask.T) for part in parts]
        rows, columns = columns, rows
    weights = sum(part.mask.numel() for part in parts)
    words = title or f"{found.name}: {_percent(parts)} of {weights:,} kept"
    names = [part.words() if len(parts) > 1 else "" for part in parts]

    # On whole pixels, as many as an image has: nothing is sampled twice or left out.
    images = _scaled([part.mask for part in parts])
    spaces = [
        max(image.shape[1], round(style.DPI * style.width_of(name)))
        for image, name in zip(images, names, strict=True)
    ]
    across = max(sum(spaces) + GAP * (len(parts) - 1), round(style.DPI * style.width_of(words)))
    wide = max(across + 2 * EDGE, NARROWEST)
    top = LINE * (2 if len(parts) > 1 else 1)
    high = top + max(image.shape[0] for image in images) + BOTTOM
    figure = Figure(figsize=(wide / style.DPI, high / style.DPI), layout="none")
    # Kept weights lie on the colour of pruned ones: a page may change that alone.
    tints = LinearSegmentedColormap.from_list("kept", [f"{KEPT}00", KEPT])
    left = EDGE
    for image, space, name in zip(images, spaces, names, strict=True):
        h, w = image.shape
        place = (left / wide, (high - top - h) / high, w / wide, h / high)
        axes = figure.add_axes(place, facecolor=PRUNED, xticks=[], yticks=[])
        axes.imshow(image.numpy(), cmap=tints, vmin=0, vmax=1, aspect="auto", interpolation="none")
        axes.spines[:].set_visible(False)
        axes.set_title(name, loc="left", pad=4)
        left += space + GAP
    first = figure.axes[0]
    first.set_xlabel(columns, fontsize=style.TEXT - 1)
    first.set_ylabel(rows, fontsize=style.TEXT - 1)
    figure.text(EDGE / wide, 1 - 6 / high, words, va="top")
    figure.legend(
        handles=[Patch(color=KEPT, label="kept"), Patch(color=PRUNED, label="pruned")],
        loc="lower right", ncols=2, fontsize=style.TEXT - 1, handlelength=1, borderaxespad=0.2,
    )  # fmt: skip
    return style.finish(figure, path)


def _percent(parts: Sequence[Part]) -> str:
    """How much is kept of all weights, "55.0 %"."""
    weights = sum(part.mask.numel() for part in parts)
    kept = sum(int(part.mask.sum()) for part in parts)
    return f"{100 * kept / weights if weights else 100:.1f} %"


def find_layer(source: Source, name: str) -> Layer:
    """The layer of this name, or with this parameter."""
    for layer in source.layers:
        if name == layer.name or name in layer.parameters:
            return layer
    hint = near(name, [layer.name for layer in source.layers])
    hint = hint or "; `dimap inspect --layers` lists them"
    raise ValueError(f"layer must be a prunable layer of the model, got {name!r}{hint}")


def _parts(source: Source, name: str) -> list[Part]:
    mask = source.mask(name).cpu().flatten(1)
    words = name.removesuffix(".weight").removesuffix(".conv").split(".")  # attn.q.conv.weight
    roles = STACKED.get(words[-1], ())
    if (source.family or "").startswith(MIXED) or not roles or mask.shape[0] % len(roles):
        return [Part(words[-1], mask)]
    return [Part(*part) for part in zip(roles, mask.chunk(len(roles)), strict=True)]


def _scaled(masks: Sequence[Tensor]) -> list[Tensor]:
    """All masks at one scale, that of the room there is: float32 [rows, columns], one a pixel."""
    columns, rows = sum(mask.shape[1] for mask in masks), max(mask.shape[0] for mask in masks)
    room = ACROSS - GAP * (len(masks) - 1)
    scale = min(room / max(columns, 1), TALL / max(rows, 1), LARGEST)
    scale = int(scale) if scale >= 1 else scale
    return [average(m, *(max(1, round(n * scale)) for n in m.shape)) for m in masks]


def average(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Kept share in each cell of another grid: float32 [rows, columns], of the same mean.

    A weight that lies across a line of the grid counts for both sides, by its area.
    """
    return _areas(mask.shape[0], rows) @ mask.float() @ _areas(mask.shape[1], columns).T


def _areas(weights: int, pixels: int) -> Tensor:
    """[pixels, weights]: how much of each pixel's length every weight takes; rows sum to 1."""
    import torch

    start = torch.arange(pixels, dtype=torch.float64).mul(weights / pixels).unsqueeze(1)
    place = torch.arange(weights, dtype=torch.float64)
    end = torch.minimum(start + weights / pixels, place + 1)
    return (end - torch.maximum(start, place)).clamp_(min=0).mul(pixels / weights).float()
