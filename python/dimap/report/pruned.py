"""What a pruning did: what prunings in memory, of files and of sharded models share; its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..groups import AUX
from ..groups.identity import addresses
from ..groups.plan import scope_names
from .report import LayerReport, ModuleReport, Report

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..flops import Flops
    from ..groups import Layer
    from ..groups.plan import Normalize, Scope


@dataclass(kw_only=True)
class Pruned:
    """What was asked for, what was cut, and counts of what is left.

    Attributes:
        modules: what `dimap.find_modules` gave, "aux" included.
        thresholds: the smallest kept score64 of each scope (of the saliency, where there is one),
            under the scope's name: "mlp", "global", "layers.0.blocks.0.attn.qkv", "mlp.1",
            "stage 0 block 1", "stage 0"; NaN where nothing is kept.
        scope, normalize: what the ranking used, given or the method's.
        sparsity: module name -> the ratio asked for.
        saliency: what was ranked: "magnitude", "given", or the method's name ("taylor", "snip").

    A subclass has, as attributes or properties, by parameter name:
        shapes: of every parameter, "aux" included.
        kept: how many weights the masks keep, of every pruned parameter.
        nonzero: how many weights are not zero after pruning, of every parameter, "aux" included.
        smallest: the smallest kept magnitude of the parameter or of its layer; none where nothing
            is kept.
    """

    modules: dict[str, list[Layer]]
    thresholds: dict[str, float]
    scope: Scope
    normalize: Normalize
    sparsity: dict[str, float]
    saliency: str = "magnitude"

    if TYPE_CHECKING:  # a dataclass would take a property of its base for a field's default

        @property
        def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
        @property
        def kept(self) -> Mapping[str, int]: ...
        @property
        def nonzero(self) -> Mapping[str, int]: ...
        @property
        def smallest(self) -> Mapping[str, float]: ...

    def mask_metadata(self) -> dict[str, str]:
        """What a file of its masks says beside them: the settings, and where each layer stands."""
        found: dict[str, str] = {"scope": self.scope, "normalize": self.normalize}
        if self.saliency != "magnitude":
            found["saliency"] = self.saliency
        found |= {f"sparsity.{name}": repr(s) for name, s in self.sparsity.items()}
        places = {
            name: list(address)
            for address, layer in addresses(self.modules).items()
            for name in layer.parameters
        }
        return found | {"addresses": json.dumps(places)}

    def report(
        self,
        model: nn.Module | Mapping[str, Tensor] | None = None,
        input_size: int | Sequence[int] | None = None,
    ) -> Report:
        """Tables of what is left; with `model`, FLOPs too (see `dimap.report.build_report`)."""
        return build_report(self, model, input_size)


def build_report(
    pruning: Pruned,
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
    counter = _Counter(pruning, flops.parameters if flops else None)
    layers: list[LayerReport] = []
    modules: list[ModuleReport] = []
    for name, members in pruning.modules.items():
        rows = counter.layers(members)
        modules.append(counter.module(name, rows))
        if name != AUX:
            layers += rows
    modules.sort(key=lambda module: module.name == AUX)
    if flops and (unused := [row.name for row in layers if row.weights and not row.flops_dense]):
        notes.append(f"no FLOPs were seen of {len(unused)} layers, {unused[0]} is the first")
    return Report(
        scope=pruning.scope,
        normalize=pruning.normalize,
        sparsity=dict(pruning.sparsity),
        modules=tuple(modules),
        layers=tuple(layers),
        model=None if model is None or isinstance(model, Mapping) else type(model).__name__,
        input_size=flops.input_size if flops else None,
        flops_other=flops.other if flops else None,
        notes=tuple(notes),
        **counter.sums(modules, flops.other if flops else 0),
    )


class _Counter:
    """Adds up the counts of parameters to those of layers and modules."""

    def __init__(self, pruning: Pruned, flops: Mapping[str, int] | None) -> None:
        self.pruning = pruning
        self.flops = flops  # parameter name -> multiply-adds; None: not counted
        # Of a pruning in memory each of these is counted when it is asked for: once.
        self.nonzero, self.smallest = pruning.nonzero, pruning.smallest
        self.weights = {name: math.prod(shape) for name, shape in pruning.shapes.items()}
        self.kept = {**self.weights, **pruning.kept}
        self.scopes = scope_names(
            pruning.modules, pruning.scope
        )  # of each layer but those of "aux"

    def sums(self, parts: Sequence[LayerReport | ModuleReport], other: int = 0) -> dict[str, Any]:
        """The counts of all parts together, and FLOPs with `other` that are of none of them."""
        names = ["weights", "kept", "nonzero"]
        sums = {name: sum(getattr(part, name) for part in parts) for name in names}
        for name in ("flops_dense", "flops_nominal", "flops") if self.flops is not None else ():
            sums[name] = other + sum(getattr(part, name) for part in parts)
        return sums

    def layers(self, layers: Sequence[Layer]) -> list[LayerReport]:
        """The rows of one module's layers."""
        names = [p for layer in layers for p in layer.parameters]
        weights, kept = (sum(count[p] for p in names) for count in (self.weights, self.kept))
        density = Fraction(kept, weights) if weights else Fraction(1)
        return [self.layer(layer, density) for layer in layers]

    def layer(self, layer: Layer, density: Fraction) -> LayerReport:
        """density: kept share of the layer's module."""
        names = layer.parameters
        dense = nominal = pruned = None
        if self.flops is not None:
            dense = pruned = 0
            for p in names:
                count = self.flops.get(p, 0)
                dense += count
                # Every weight of a matrix or a kernel meets equally many tokens: count / weights.
                if count and layer.module != AUX:
                    count = count * self.nonzero[p] // self.weights[p]
                pruned += count
            nominal = round(dense * density)
        threshold = self.pruning.thresholds.get(self.scopes.get(layer.name, ""), math.nan)
        return LayerReport(
            name=layer.name,
            module=layer.module,
            stage=layer.stage,
            block=layer.block,
            parameters=tuple(names),
            weights=sum(self.weights[p] for p in names),
            kept=sum(self.kept[p] for p in names),
            nonzero=sum(self.nonzero[p] for p in names),
            threshold=None if math.isnan(threshold) else threshold,
            smallest_kept=min(
                (self.smallest[p] for p in names if p in self.smallest), default=None
            ),
            flops_dense=dense,
            flops_nominal=nominal,
            flops=pruned,
        )

    def module(self, name: str, rows: Sequence[LayerReport]) -> ModuleReport:
        shared = self.pruning.scope in ("module", "global")
        thresholds = {row.threshold for row in rows} if shared else set()
        threshold = thresholds.pop() if len(thresholds) == 1 else None
        return ModuleReport(name=name, layers=len(rows), threshold=threshold, **self.sums(rows))


def _check_same(pruning: Pruned, model: nn.Module | Mapping[str, Tensor] | None) -> None:
    if model is None:
        return
    tensors: Mapping[str, Tensor] = (
        model
        if isinstance(model, Mapping)
        # Buffers too: a state dict that was pruned may hold some that look like parameters.
        else dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    )
    shapes = pruning.shapes
    for name in (p for layers in pruning.modules.values() for x in layers for p in x.parameters):
        shape = tuple(shapes[name])
        got = tuple(tensors[name].shape) if name in tensors else "no such parameter"
        if got != shape:
            raise ValueError(
                f"model must be the one that was pruned: {name} must have shape {shape}, got {got}"
            )


def _flops(
    model: nn.Module | Mapping[str, Tensor] | None, input_size: int | Sequence[int] | None
) -> tuple[Flops | None, list[str]]:
    """FLOPs, or a note that says why there are none."""
    if model is None or isinstance(model, Mapping):
        return None, ["no FLOPs: weights alone do not tell them, the nn.Module does"]
    from ..flops import count_flops

    if input_size is not None:
        return count_flops(model, input_size), []
    try:
        return count_flops(model), []
    except (ValueError, RuntimeError) as error:
        return None, [f"no FLOPs: {error}"]
