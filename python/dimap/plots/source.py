"""What the pictures are drawn from: layers, weights and masks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..groups import (
    AUX,
    Choice,
    Layer,
    Patterns,
    Slice,
    choose,
    family_of,
    group_names,
    position,
    shapes_of,
    whole,
)
from ..report import LayerReport, Pruned, Report
from ..report.text import leaves

if TYPE_CHECKING:
    from torch import Tensor


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


def source_of(
    model: Any, masks: Mapping[str, Tensor] | None = None, patterns: Patterns | Choice | None = None
) -> Source:
    """Make a Source of a Pruning, a checkpoint that is open, a model or a state dict.

    masks: parameter name -> bool tensor of its shape, True = kept; may be read as it is asked for.
        None: a Pruning has its own; elsewhere what is zero is pruned.
    patterns: as in `dimap.find_modules`; a Pruning knows its modules.

    Raises TypeError for another kind of model, ValueError where masks are of another model.
    """
    if isinstance(model, Source):
        return model
    import torch

    modules, shapes, get = _read(model, patterns)
    if isinstance(model, Pruned) and masks is None:
        masks = getattr(model, "masks", None)
    layers = prunable(modules)
    if masks is not None:
        known = {whole(parameter) for layer in layers for parameter in layer.parameters}
        if odd := [name for name in masks if name not in known]:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ValueError(
                f"masks must be of this model's prunable weights, got one of {odd[0]}{more}"
            )

    def weight(name: str) -> Tensor:
        found = get(whole(name))
        return found[name.at] if isinstance(name, Slice) else found

    def mask(name: str) -> Tensor:
        if isinstance(name, Slice) and masks is not None and name.parameter in masks:
            return mask(name.parameter)[name.at]
        if masks is None:
            return weight(name) != 0
        if name not in masks:  # of a pruning that left this layer out
            return torch.ones(weight(name).shape, dtype=torch.bool)
        found, shape = masks[name], tuple(shapes[name])
        if tuple(found.shape) != shape:
            raise ValueError(
                f"the mask of {name} must have the weight's shape {shape}, got {tuple(found.shape)}"
            )
        return found

    own = choose(patterns) or getattr(model, "choice", None)
    family = None if own else family_of(shapes)
    return Source(layers, weight, mask, family.name if family else None)


def _read(
    model: Any, patterns: Patterns | Choice | None
) -> tuple[Mapping[str, Sequence[Layer]], Mapping[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Modules, shapes of the parameters, and what gives a weight."""
    if isinstance(model, Pruned):
        if not hasattr(model, "parameters"):
            raise TypeError("model must hold its masks, got what was pruned from file to file")
        return model.modules, model.shapes, lambda name: model.parameters[name].detach()
    from torch import nn

    if isinstance(model, (nn.Module, Mapping)):
        tensors = model.state_dict() if isinstance(model, nn.Module) else model
        shapes = shapes_of(tensors)
        return group_names(shapes, patterns), shapes, lambda name: tensors[name].detach()
    if hasattr(model, "tensors") and hasattr(model, "get"):  # an open checkpoint
        shapes = model.shapes() if hasattr(model, "shapes") else shapes_of(model.tensors)
        chosen = choose(patterns) or getattr(model, "choice", None)
        return group_names(shapes, chosen), shapes, model.get
    raise TypeError(
        "model must be a Pruning, an open checkpoint, an nn.Module or a state dict, "
        f"got {type(model).__name__}"
    )


def counts_of(
    model: Any, masks: Mapping[str, Tensor] | None = None, patterns: Patterns | Choice | None = None
) -> list[LayerReport]:
    """Count what each layer keeps, block after block: from a Report, or as `source_of`."""
    if isinstance(model, Pruned) and masks is None:
        model = model.report()
    if isinstance(model, Report):
        return sorted(model.layers, key=position)
    source = source_of(model, masks, patterns)
    rows = []
    for layer in source.layers:
        weights = kept = 0
        for mask in map(source.mask, layer.parameters):
            weights += mask.numel()
            kept += int(mask.count_nonzero())
        place = (layer.name, layer.module, layer.stage, layer.block, layer.parameters)
        rows.append(
            LayerReport(*place, weights, kept, nonzero=kept, threshold=None, tower=layer.tower)
        )
    return rows


def prunable(modules: Mapping[str, Sequence[Layer]]) -> list[Layer]:
    """The layers that can be pruned, block after block."""
    layers = [layer for name, found in modules.items() if name != AUX for layer in found]
    return sorted(layers, key=position)


def place_name(layer: Layer | LayerReport) -> str:
    """ "stage 2, block 5" """
    named = [("stage", layer.stage), ("block", layer.block)]
    return ", ".join(f"{kind} {number}" for kind, number in named if number is not None)


def kinds(layers: Sequence[Any]) -> dict[str, str]:
    """Layer name -> what it is in its block ("attn.qkv"); outside blocks, its module.

    layers: those of a Source or a Report, block after block.
    """
    found: dict[str, str] = {}
    for _, members in groupby(layers, key=position):
        block = list(members)
        names = [layer.name for layer in block]
        inside = block[0].block is not None
        kind = leaves(names) if inside else [layer.module for layer in block]
        found |= dict(zip(names, kind, strict=True))
    return found
