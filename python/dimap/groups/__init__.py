"""Which parameters are pruned, and which of them together: names become layers and modules.

Nothing here reads a weight. `find_modules` takes a model or a state dict, `group_names` only names
and shapes. The tables of known names are in `families`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..families import BUFFERS, FAMILIES, Family
from .known import Fit, bare, fit
from .layers import AUX, Layer, Located, Shape, first, kinds, position
from .patterns import Patterns, group_by

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "AUX",
    "Layer",
    "Located",
    "Patterns",
    "Shape",
    "family_of",
    "find_modules",
    "group_names",
    "is_parameter",
    "position",
    "shapes_of",
]

Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"


def find_modules(model: Model, patterns: Patterns | None = None) -> dict[str, list[Layer]]:
    """Group a model's parameters into layers and modules, by their names and shapes alone.

    model: an nn.Module or a state dict; any device, meta too. Of a state dict, buffers are left
        out: those of `families.BUFFERS`, and what is neither floating point nor called `weight`.
    patterns: instead of the known families, the caller's own: module name -> regex, or a list of
        them, each matched against whole parameter names (`re.fullmatch`); the first that matches
        wins. A tuple inside a list is one layer made of several tensors, in that order, joined by
        what its regexes capture. Named groups `stage` and `block` give those numbers:

            {"qkv": [tuple(rf"blocks\\.(?P<block>\\d+)\\.attn\\.{x}\\.weight" for x in "qkv")],
             "mlp": r"blocks\\.(?P<block>\\d+)\\.mlp\\.fc[12]\\.weight"}

    Returns module name -> layers, "aux" (never pruned) last; every parameter is in exactly one
    layer. Layers of a module stand in the order of stage, block and place in the block (own
    patterns: stage, block, name with its numbers taken as numbers), however the mapping is ordered:
    so a model, its file (safetensors sorts names) and its split or fused form resolve ties alike.
    "aux" keeps the mapping's order.

    Raises ValueError for a model of no known family or one that differs from it, and for patterns
    that are malformed, match nothing, or match a parameter of fewer than two dimensions; TypeError
    for anything but a model, a mapping of tensors, or patterns of the form above.
    """
    return group_names(shapes_of(model), patterns)


def shapes_of(model: Model) -> dict[str, Shape]:
    """The names and shapes of a model's parameters, or of those in a state dict.

    Raises TypeError for anything but a model or a mapping of tensors.
    """
    from torch import Tensor, nn

    if isinstance(model, nn.Module):
        return {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: object = model  # callers are not bound by the annotation
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"model must be an nn.Module or a mapping of names to tensors, got {kind}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"a state dict must hold tensors only, got {kind} under {name!r}")
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if is_parameter(name, tensor.is_floating_point())
    }


def is_parameter(name: str, floating_point: bool) -> bool:
    """Whether an entry of a state dict is taken for a parameter, known buffers aside.

    A weight of another type is one too: quantized weights are told apart from counters this way.
    """
    return floating_point or name.rpartition(".")[2] == "weight"


def group_names(
    shapes: Mapping[str, Sequence[int]], patterns: Patterns | None = None
) -> dict[str, list[Layer]]:
    """`find_modules` on names and shapes: leaves out known buffers, knows nothing of dtypes."""
    seen = _without_buffers(shapes)
    if not seen:
        raise ValueError("model must have at least one parameter, got none")
    if patterns is not None:
        return group_by(patterns, seen)
    fits = _fits(seen)
    if fits and not fits[-1].problems:
        return fits[-1].modules
    near = [fit for fit in fits if all(fit.modules.values())]  # it has a layer in every module
    nearest = min(near, key=lambda fit: len(fit.problems), default=None)
    raise ValueError(_describe_misfit(nearest) if nearest else _describe_unknown(seen))


def family_of(shapes: Mapping[str, Sequence[int]]) -> Family | None:
    """The family by whose table `group_names` groups these names; None: it would refuse them."""
    fits = _fits(_without_buffers(shapes))
    return fits[-1].family if fits and not fits[-1].problems else None


_BUFFER = re.compile("|".join(BUFFERS))


def _without_buffers(shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    return {name: tuple(s) for name, s in shapes.items() if not _BUFFER.fullmatch(bare(name))}


def _fits(shapes: Mapping[str, Shape]) -> list[Fit]:
    """The families that have any of these names, up to the first of which all names are."""
    fits = []
    for family in FAMILIES:
        found = fit(family, shapes)
        if found is not None:
            fits.append(found)
            if not found.problems:
                break
    return fits


_HINT = r"""Name its modules with patterns=, regexes that match whole parameter names, for example
  patterns={"qkv": r"blocks\.(?P<block>\d+)\.attn\.qkv\.weight",
            "mlp": [r"blocks\.(?P<block>\d+)\.mlp\.fc1\.weight",
                    r"blocks\.(?P<block>\d+)\.mlp\.fc2\.weight"]}
What they leave over is never pruned."""


def _describe_unknown(shapes: Mapping[str, Shape]) -> str:
    known = "; ".join(family.models for family in FAMILIES)
    matrices = sum(len(shape) > 1 for shape in shapes.values())
    return (
        f"model must be of a known family ({known}), got {len(shapes)} parameters, {matrices} of "
        f"two or more dimensions:\n{kinds(shapes)}\n{_HINT}"
    )


def _describe_misfit(fit: Fit) -> str:
    problems = "\n  ".join(first(fit.problems))
    return (
        f"model must be of a known family, got one that resembles {fit.family.name} "
        f"({fit.family.models}) but differs:\n  {problems}\n{_HINT}"
    )
