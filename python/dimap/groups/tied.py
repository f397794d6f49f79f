"""Tied weights: a weight is its storage, not its name. Each is ranked and counted once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from .layers import AUX, Layer, whole

if TYPE_CHECKING:
    from torch import Tensor, nn


def named_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a model, or the entries of a state dict, by name.

    A module that is used several times is one, under its first name; a parameter that several
    modules share is under the name that it has in each.
    """
    if isinstance(model, Mapping):
        return dict(model)
    return {
        f"{module}.{name}" if module else name: parameter
        for module, owner in model.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
    }


def ties_of(tensors: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names of each set of tensors that are the same weights: one object, or one view of one
    storage. What is alone is left out."""
    same: dict[object, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        view = _view(tensor)
        key = id(tensor) if view is None else (*view, tuple(tensor.shape), tensor.stride())
        same[key].append(name)
    return [tuple(names) for names in same.values() if len(names) > 1]


def check_apart(names: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """Raise ValueError for two contiguous tensors that share a part of their memory."""
    extents = []
    for name, tensor in zip(names, tensors, strict=True):
        if (view := _view(tensor)) is not None and tensor.is_contiguous():
            extents.append((*view, name))
    extents.sort(key=lambda extent: extent[:2])
    for (_, end, name), (begin, _, other) in pairwise(extents):
        if begin < end:
            raise ValueError(
                f"{name} and {other} must be the same weights or share no memory, got two that "
                "overlap: clone() one of them"
            )


def _view(tensor: Tensor) -> tuple[int, int] | None:
    """The bytes [begin, end) in which a tensor lies; None where there are none to speak of."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def untie(
    modules: Mapping[str, Sequence[Layer]], ties: Sequence[tuple[str, ...]], notes: list[str]
) -> dict[str, list[Layer]]:
    """The modules with each weight under one name: the first, or one that is never pruned.

    What shares its storage with a weight that is never pruned, is never pruned itself; `notes` says so.
    """
    where = {whole(p): m for m, layers in modules.items() for x in layers for p in x.parameters}
    dropped, freed = set(), []
    for names in ties:
        known = [name for name in names if name in where]
        aux = [name for name in known if where[name] == AUX]
        others = {name for name in known if name != (aux or known)[0]}
        freed += [name for name in others if aux and where[name] != AUX]
        dropped |= others
    if freed:
        notes.append(
            f"never pruned, being tied to weights that are not: {len(freed)} parameters, such as "
            f"{min(freed)}"
        )
    if len(dropped) > len(freed):
        notes.append(
            f"tied weights are ranked and counted once: {len(dropped) - len(freed)} parameters are "
            "other names of them"
        )
    return {module: list(_without(layers, dropped)) for module, layers in modules.items()}


def _without(layers: Sequence[Layer], dropped: set[str]) -> Iterator[Layer]:
    for layer in layers:
        left = tuple(part for part in layer.parameters if whole(part) not in dropped)
        if left:
            yield layer if left == layer.parameters else replace(layer, parameters=left)
