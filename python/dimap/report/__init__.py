"""Build the report of a pruning: what was removed, per layer, per module and in all.

The figures and their JSON schema are described in `Report`, `ModuleReport` and `LayerReport`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..distributed._sharded import check_whole
from ..flops import Flops, count_flops
from ..groups import AUX
from ..groups._scopes import scope_names
from ._types import VERSION, LayerReport, ModuleReport, Report

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = ["VERSION", "LayerReport", "ModuleReport", "Report", "build_report"]


class LayerLike(Protocol):
    """The part of `groups.Layer` that a report reads."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def stage(self) -> int | None: ...
    @property
    def block(self) -> int | None: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...


class PruningLike(Protocol):
    """The part of `pruning.Pruning` that a report reads."""

    @property
    def masks(self) -> Mapping[str, Tensor]: ...
    @property
    def modules(self) -> Mapping[str, Sequence[LayerLike]]: ...
    @property
    def thresholds(self) -> Mapping[str, float]: ...
    @property
    def scope(self) -> str: ...
    @property
    def normalize(self) -> str: ...
    @property
    def sparsity(self) -> Mapping[str, float]: ...
    @property
    def parameters(self) -> Mapping[str, Tensor]: ...


class CountedLike(Protocol):
    """The part of `stream.StreamPruning` that a report reads: counts instead of weights."""

    @property
    def modules(self) -> Mapping[str, Sequence[LayerLike]]: ...
    @property
    def thresholds(self) -> Mapping[str, float]: ...
    @property
    def scope(self) -> str: ...
    @property
    def normalize(self) -> str: ...
    @property
    def sparsity(self) -> Mapping[str, float]: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def kept(self) -> Mapping[str, int]: ...
    @property
    def nonzero(self) -> Mapping[str, int]: ...
    @property
    def smallest(self) -> Mapping[str, float]: ...


def build_report(
    pruning: PruningLike | CountedLike,
    model: nn.Module | Mapping[str, Tensor] | None = None,
    input_size: int | Sequence[int] | None = None,
) -> Report:
    """Count what `pruning` removed.

    Args:
        pruning: what `dimap.prune` or `dimap.stream.prune_checkpoint` returned.
        model: the model that was pruned, for its FLOPs. An nn.Module with these names and shapes
            will do, on any device, the meta device too; a state dict has no FLOPs.
        input_size: as in `flops.count_flops`. Where it is None and the model does not say it, or
            the forward pass at the size it says fails, the report has no FLOPs and says why.

    Raises:
        ValueError: `model` is not the model that was pruned (names or shapes differ), or what was
            pruned is sharded (DTensor).
        RuntimeError: the forward pass at the given `input_size` failed.
    """
    _check_same(pruning, model)
    flops, notes = _flops(model, input_size)
    tally = _Tally.of(pruning, flops)
    layers: list[LayerReport] = []
    modules: list[ModuleReport] = []
    for name, members in pruning.modules.items():
        parameters = [p for layer in members for p in layer.parameters]
        weights = sum(tally.weights[p] for p in parameters)
        kept = sum(tally.kept[p] for p in parameters)
        density = Fraction(kept, weights) if weights else Fraction(1)
        rows = [_layer(tally, layer, density) for layer in members]
        shared = pruning.scope in ("module", "global")
        thresholds = {row.threshold for row in rows} if shared else set()
        modules.append(
            ModuleReport(
                name=name,
                layers=len(rows),
                weights=weights,
                kept=kept,
                nonzero=sum(row.nonzero for row in rows),
                threshold=thresholds.pop() if len(thresholds) == 1 else None,
                flops_dense=tally.sum(row.flops_dense for row in rows),
                flops_nominal=tally.sum(row.flops_nominal for row in rows),
                flops=tally.sum(row.flops for row in rows),
            )
        )
        if name != AUX:
            layers += rows
    modules.sort(key=lambda module: module.name == AUX)
    if flops and (unused := [row.name for row in layers if row.weights and not row.flops_dense]):
        notes.append(f"no FLOPs were seen of {len(unused)} layers, {unused[0]} is the first")
    other = flops.other if flops else None
    return Report(
        scope=pruning.scope,
        normalize=pruning.normalize,
        sparsity=dict(pruning.sparsity),
        weights=sum(module.weights for module in modules),
        kept=sum(module.kept for module in modules),
        nonzero=sum(module.nonzero for module in modules),
        modules=tuple(modules),
        layers=tuple(layers),
        model=type(model).__name__ if isinstance(model, nn.Module) else None,
        input_size=flops.input_size if flops else None,
        flops_dense=tally.sum((other, *(module.flops_dense for module in modules))),
        flops_nominal=tally.sum((other, *(module.flops_nominal for module in modules))),
        flops=tally.sum((other, *(module.flops for module in modules))),
        flops_other=other,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Tally:
    """Counts of every parameter that is in a layer, by its name."""

    pruning: PruningLike | CountedLike
    weights: dict[str, int]
    kept: dict[str, int]
    nonzero: dict[str, int]
    smallest: dict[str, float]  # smallest kept |w|, where anything is kept
    scopes: dict[str, str]  # layer name -> the scope it was ranked in
    flops: Mapping[str, int] | None  # None: not counted

    @classmethod
    def of(cls, pruning: PruningLike | CountedLike, flops: Flops | None) -> _Tally:
        scopes = scope_names(pruning.modules, pruning.scope)
        tally = cls(pruning, {}, {}, {}, {}, scopes, flops.parameters if flops else None)
        for p in _names(pruning):
            weights = math.prod(_shape(pruning, p))
            tally.weights[p] = tally.kept[p] = weights
            if _counted(pruning):
                tally.nonzero[p] = pruning.nonzero[p]
                tally.kept[p] = pruning.kept.get(p, weights)
                if p in pruning.smallest:
                    tally.smallest[p] = pruning.smallest[p]
                continue
            weight, mask = pruning.parameters[p].detach(), pruning.masks.get(p)
            check_whole([weight], "a report")
            tally.nonzero[p] = int(weight.count_nonzero())
            if mask is not None:
                tally.kept[p] = int(mask.count_nonzero())
                if tally.kept[p]:
                    magnitude = torch.where(mask.to(weight.device), weight.abs(), math.inf)
                    tally.smallest[p] = float(magnitude.amin())
        return tally

    def sum(self, counts: Iterable[int | None]) -> int | None:
        """Sum of FLOPs; None where they were not counted."""
        return None if self.flops is None else sum(count or 0 for count in counts)


def _layer(tally: _Tally, layer: LayerLike, density: Fraction) -> LayerReport:
    """`density`: kept share of the layer's module."""
    names = layer.parameters
    dense = nominal = pruned = None
    if tally.flops is not None:
        dense = pruned = 0
        for p in names:
            count = tally.flops.get(p, 0)
            dense += count
            # Every weight of a matrix or a kernel meets the same number of tokens: count / weights.
            if count and layer.module != AUX:
                count = count * tally.nonzero[p] // tally.weights[p]
            pruned += count
        nominal = round(dense * density)
    return LayerReport(
        name=layer.name,
        module=layer.module,
        stage=layer.stage,
        block=layer.block,
        parameters=tuple(names),
        weights=sum(tally.weights[p] for p in names),
        kept=sum(tally.kept[p] for p in names),
        nonzero=sum(tally.nonzero[p] for p in names),
        threshold=_threshold(tally, layer),
        smallest_kept=min((tally.smallest[p] for p in names if p in tally.smallest), default=None),
        flops_dense=dense,
        flops_nominal=nominal,
        flops=pruned,
    )


def _threshold(tally: _Tally, layer: LayerLike) -> float | None:
    name = tally.scopes.get(layer.name)  # None: "aux"
    value = math.nan if name is None else tally.pruning.thresholds.get(name, math.nan)
    return None if math.isnan(value) else value


def _names(pruning: PruningLike | CountedLike) -> list[str]:
    """Names of all parameters that are in a layer: a state dict may hold buffers beside them."""
    return [p for layers in pruning.modules.values() for layer in layers for p in layer.parameters]


def _counted(pruning: PruningLike | CountedLike) -> TypeIs[CountedLike]:
    return hasattr(pruning, "kept")


def _shape(pruning: PruningLike | CountedLike, name: str) -> tuple[int, ...]:
    if _counted(pruning):
        return pruning.shapes[name]
    return tuple(pruning.parameters[name].shape)


def _check_same(
    pruning: PruningLike | CountedLike, model: nn.Module | Mapping[str, Tensor] | None
) -> None:
    if model is None:
        return
    tensors: Mapping[str, Tensor] = (
        # Buffers too: a state dict that was pruned may hold some that look like parameters.
        dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        if isinstance(model, nn.Module)
        else model
    )
    for name in _names(pruning):
        shape = _shape(pruning, name)
        got = tuple(tensors[name].shape) if name in tensors else "no such parameter"
        if got != shape:
            raise ValueError(
                f"model must be the one that was pruned: {name} must have shape {shape}, got {got}"
            )


def _flops(
    model: nn.Module | Mapping[str, Tensor] | None, input_size: int | Sequence[int] | None
) -> tuple[Flops | None, list[str]]:
    """FLOPs, or a note that says why there are none."""
    if not isinstance(model, nn.Module):
        return None, ["no FLOPs: weights alone do not tell them, the nn.Module does"]
    if input_size is not None:
        return count_flops(model, input_size), []
    try:
        return count_flops(model), []
    except (ValueError, RuntimeError) as error:
        return None, [f"no FLOPs: {error}"]
