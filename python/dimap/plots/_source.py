"""What the pictures are drawn from: layers, weights and masks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .._report_tables import _leaves
from .._report_types import Report
from ..checkpoint import Checkpoint
from ..groups import AUX, Layer, Patterns, find_modules


@dataclass
class Source:
    """A network to draw. `weight` and `mask` give one tensor by the parameter's name.

    layers: those that can be pruned, block after block.
    family: the name of the table that its names fit (see `dimap.families`); None for own patterns.
    """

    layers: list[Layer]
    shapes: dict[str, tuple[int, ...]]
    weight: Callable[[str], Tensor] = field(repr=False)
    mask: Callable[[str], Tensor] = field(repr=False)
    family: str | None = None


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
    layers = [layer for name, found in modules.items() if name != AUX for layer in found]
    shapes = {p: tuple(tensors[p].shape) for layer in layers for p in layer.parameters}
    if masks is not None:
        _check_masks(masks, shapes)

    def weight(name: str) -> Tensor:
        return get(name).detach()

    def mask(name: str) -> Tensor:
        if masks is None:
            return weight(name) != 0
        if name not in masks:  # of a pruning that left this layer out
            return weight(name).isfinite()
        found = masks[name]
        if tuple(found.shape) != shapes[name]:
            raise ValueError(
                f"the mask of {name} must have the weight's shape {shapes[name]}, "
                f"got {tuple(found.shape)}"
            )
        return found

    return Source(
        sorted(layers, key=place),
        shapes,
        weight,
        mask,
        None if patterns else _family(modules, tensors),
    )


def _check_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    odd = [name for name in masks if name not in shapes]
    if odd:
        raise ValueError(
            f"masks must be of this model's prunable weights, got one of {odd[0]}"
            + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
        )


def _family(modules: Mapping[str, list[Layer]], tensors: Mapping[str, Tensor]) -> str | None:
    from .._inspect import family_of

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
