"""What the pictures are drawn from: layers, weights and masks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..groups import (
    AUX,
    Choice,
    Layer,
    Patterns,
    Slice,
    choose,
    family_of,
    group,
    named_tensors,
    position,
    shapes_of,
    tied_in,
    whole,
)
from ..report import LayerReport, Pruned, Report
from ..report.text import names_in_blocks

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")


@dataclass
class Source:
    """A network to draw. `weight` and `mask` give one tensor by the parameter's name.

    layers: those that can be pruned, block after block.
    family: the name of the table that its names fit (see `dimap.families`); None for own patterns.
    """

    layers: list[Layer]
    weight: Callable[[str], Tensor] = field(repr=False)
    mask: Callable[[str], Tensor] = field(repr=False)
    family: str | None = None

    def counts(self) -> list[LayerReport]:
        """What each layer keeps."""
        rows = []
        for layer in self.layers:
            masks = [self.mask(name) for name in layer.parameters]
            weights, kept = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
            place = (layer.name, layer.module, layer.stage, layer.block, layer.parameters)
            row = LayerReport(*place, weights, kept, kept, threshold=None, tower=layer.tower)
            rows.append(row)
        return rows


def source_of(
    model: Any, masks: Mapping[str, Tensor] | None = None, patterns: Patterns | Choice | None = None
) -> Source:
    """Make a Source of a Pruning, a checkpoint that is open, a model or a state dict.

    masks: as `fit_masks` takes them, under any spelling of the model; may be read as they are asked for.
        None: a Pruning has its own; elsewhere what is zero is pruned.
    patterns: as in `dimap.find_modules`; a Pruning knows its modules.

    Raises TypeError for another kind of model, ValueError where masks are of another model.
    """
    if isinstance(model, Source):
        return model
    import torch

    from ..masks import fit_shapes

    get: Callable[[str], Tensor]
    choice = choose(patterns)
    if isinstance(model, Pruned):
        if not hasattr(model, "masks"):
            raise TypeError(
                "what prune_checkpoint returns holds no masks: give the pruned checkpoint, or the "
                "dense one and its masks"
            )
        shapes, get = model.shapes, model.parameters.__getitem__  # type: ignore[attr-defined]
        masks = model.masks if masks is None else masks
        modules = model.modules
    else:
        if hasattr(model, "tensors") and hasattr(model, "get"):  # an open checkpoint
            shapes, get, ties = model.shapes(), model.get, model.ties()
            choice = choice or model.choice
        else:
            shapes, get, ties = shapes_of(model), named_tensors(model).__getitem__, tied_in(model)
        modules = group(shapes, choice, ties).modules
    layers = prunable(modules)
    known = {whole(parameter) for layer in layers for parameter in layer.parameters}
    try:
        fitted = {name: same for same in fit_shapes(masks or {}, shapes) for name in same.names}
    except ValueError as error:
        raise ValueError(f"masks must be of this model's prunable weights: {error}") from error
    if odd := [name for name in fitted if name not in known]:
        raise ValueError(f"masks must be of this model's prunable weights, got one of {odd[0]}")

    def weight(name: str) -> Tensor:
        found = get(whole(name)).detach()
        return found[name.at] if isinstance(name, Slice) else found

    def mask(name: str) -> Tensor:
        if masks is None:
            return weight(name) != 0
        if isinstance(name, Slice):
            return mask(name.parameter)[name.at]
        if name not in fitted:  # of a pruning that left this layer out
            return torch.ones(shapes[name], dtype=torch.bool)
        return fitted[name].load()[name]

    family = None if choice else family_of(shapes)
    return Source(layers, weight, mask, family.name if family else None)


def counts_of(
    model: Any, masks: Mapping[str, Tensor] | None = None, patterns: Patterns | Choice | None = None
) -> list[LayerReport]:
    """What each layer keeps, block after block: of a Report, or counted as `source_of`."""
    if isinstance(model, Pruned) and masks is None:
        model = model.report()
    if isinstance(model, Report):
        return sorted(model.layers, key=position)
    return source_of(model, masks, patterns).counts()


def prunable(modules: Mapping[str, Sequence[Layer]]) -> list[Layer]:
    """The layers that can be pruned, block after block."""
    layers = [layer for name, found in modules.items() if name != AUX for layer in found]
    return sorted(layers, key=position)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Of many, as many as `count`: the first, the last, and those evenly between."""
    steps = {round(k * (len(items) - 1) / (count - 1)) for k in range(count)}
    return [items[i] for i in sorted(steps)]


def place_name(layer: Layer | LayerReport, between: str = ", ") -> str:
    """ "stage 2, block 5" """
    named = [("stage", layer.stage), ("block", layer.block)]
    numbers = [f"{kind} {number}" for kind, number in named if number is not None]
    return between.join([layer.tower, *numbers] if layer.tower else numbers)


def kinds(layers: Sequence[Layer | LayerReport]) -> dict[str, str]:
    """Layer name -> what it is in its block ("attn.qkv"); outside blocks, its module.

    layers: those of a Source or a Report, block after block.
    """
    names = names_in_blocks(layers)
    return {x.name: x.module if x.block is None else names[x.name] for x in layers}
