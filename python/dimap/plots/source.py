"""What the pictures are drawn from: layers, weights and masks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..groups import AUX, Layer, Patterns, find_modules
from ..report._tables import _leaves
from ..report._types import Report


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

    @classmethod
    def of(
        cls,
        modules: Mapping[str, list[Layer]],
        tensors: Mapping[str, Tensor],
        weight: Callable[[str], Tensor],
        mask: Callable[[str], Tensor],
        *,
        known: bool = True,
    ) -> Source:
        """From what `find_modules` gave for `tensors`; known: by no patterns of the caller's own."""
        layers = [layer for name, found in modules.items() if name != AUX for layer in found]
        family = _family(modules, tensors) if known else None
        return cls(sorted(layers, key=place), weight, mask, family)


@dataclass(frozen=True)
class LayerCount:
    """Weights of a layer, and how many of them are kept."""

    name: str
    module: str
    stage: int | None
    block: int | None
    weights: int
    kept: int


def source_of(
    model: Any, masks: Mapping[str, Tensor] | None = None, patterns: Patterns | None = None
) -> Source:
    """Make a Source of a Pruning, a checkpoint that is open, a model or a state dict.

    masks: parameter name -> bool tensor of its shape, True = kept; may be read as it is asked for.
        None: a Pruning has its own; elsewhere what is zero is pruned.
    patterns: as in `dimap.find_modules`; a Pruning knows its modules.

    Raises TypeError for another kind of model, ValueError where masks are of another model.
    """
    if isinstance(model, Source):
        return model
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    modules = getattr(model, "modules", None)
    if isinstance(modules, Mapping) and hasattr(model, "parameters"):  # a Pruning
        if not hasattr(model, "masks"):
            raise TypeError("model must hold its masks, got what was pruned from file to file")
        tensors = weights = model.parameters
        masks = model.masks if masks is None else masks
        get = weights.__getitem__
    else:
        if isinstance(model, Checkpoint):
            tensors, get = model.tensors, model.get
        elif isinstance(model, (nn.Module, Mapping)):
            tensors = model.state_dict() if isinstance(model, nn.Module) else model
            get = tensors.__getitem__
        else:
            kind = type(model).__name__
            raise TypeError(
                "model must be a Pruning, an open checkpoint, an nn.Module or a state dict, "
                f"got {kind}"
            )
        modules = find_modules(tensors, patterns)
    if masks is not None:
        _check_masks(masks, modules)

    def weight(name: str) -> Tensor:
        return get(name).detach()

    def mask(name: str) -> Tensor:
        if masks is None:
            return weight(name) != 0
        if name not in masks:  # of a pruning that left this layer out
            return torch.ones_like(weight(name), dtype=torch.bool)
        found, shape = masks[name], tuple(tensors[name].shape)
        if tuple(found.shape) != shape:
            raise ValueError(
                f"the mask of {name} must have the weight's shape {shape}, got {tuple(found.shape)}"
            )
        return found

    return Source.of(modules, tensors, weight, mask, known=patterns is None)


def _check_masks(masks: Mapping[str, Tensor], modules: Mapping[str, Sequence[Layer]]) -> None:
    prunable = {
        parameter
        for name, layers in modules.items()
        if name != AUX
        for layer in layers
        for parameter in layer.parameters
    }
    if odd := [name for name in masks if name not in prunable]:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ValueError(
            f"masks must be of this model's prunable weights, got one of {odd[0]}{more}"
        )


def _family(modules: Mapping[str, list[Layer]], tensors: Mapping[str, Tensor]) -> str | None:
    from ..checkpoint._inspect import family_of

    shaped: Any = {name: SimpleNamespace(shape=tuple(t.shape)) for name, t in tensors.items()}
    family = family_of(modules, shaped)
    return family.name if family else None


def counts_of(
    model: Any, masks: Mapping[str, Tensor] | None = None, patterns: Patterns | None = None
) -> list[LayerCount]:
    """Count what each layer keeps, block after block: from a Report, or as `source_of`."""
    if isinstance(model, Report):
        counts = [
            LayerCount(row.name, row.module, row.stage, row.block, row.weights, row.kept)
            for row in model.layers
        ]
        return sorted(counts, key=place)
    source = source_of(model, masks, patterns)
    counts = []
    for layer in source.layers:
        weights = kept = 0
        for parameter in layer.parameters:
            mask = source.mask(parameter)
            weights += mask.numel()
            kept += int(mask.count_nonzero())
        counts.append(LayerCount(layer.name, layer.module, layer.stage, layer.block, weights, kept))
    return counts


def place(layer: Layer | LayerCount) -> tuple[float, float]:
    """Sort key: stage and block; what is outside of them last."""
    nowhere = float("inf")
    return (
        nowhere if layer.stage is None else layer.stage,
        nowhere if layer.block is None else layer.block,
    )


def place_name(stage: int | None, block: int | None) -> str:
    """ "stage 2, block 5" """
    named = [("stage", stage), ("block", block)]
    return ", ".join(f"{kind} {number}" for kind, number in named if number is not None)


def kinds(layers: list[Any]) -> dict[str, str]:
    """Layer name -> what it is in its block ("attn.qkv"); outside blocks, its module.

    layers: Layers or LayerCounts, sorted by `place`.
    """
    found: dict[str, str] = {}
    for _, members in groupby(layers, key=place):
        block = list(members)
        if block[0].block is None:
            found |= {layer.name: layer.module for layer in block}
        else:
            names = [layer.name for layer in block]
            found |= dict(zip(names, _leaves(names), strict=True))
    return found
