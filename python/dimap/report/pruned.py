"""What a pruning did: what prunings in memory, of files and of sharded models share; its report."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..groups import AUX, kind_of, whole
from ..groups.identity import Address, addresses, same_weights
from ..groups.plan import scope_names
from .report import LayerReport, ModuleReport, Report

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..flops import Flops
    from ..groups import Layer
    from ..groups.plan import Normalize, Scope


@dataclass(kw_only=True, repr=False)
class Pruned:
    """What was asked for, what was cut, and counts of what is left.

    Attributes:
        modules: what `dimap.find_modules` gave, "aux" included.
        thresholds: the smallest kept score64 of each scope (of the saliency, where there is one),
            under the scope's name: "mlp", "global", "layers.0.blocks.0.attn.qkv", "mlp.1",
            "stage 0 block 1", "stage 0"; NaN where nothing is kept.
        scope, normalize: what the ranking used, given or the method's.
        sparsity: module name -> the ratio asked for.
        notes: what the user should know, of the grouping say, one sentence each.
        saliency: what was ranked: "magnitude", "given", or the method's name ("taylor", "snip").
        asked: the budgets and limits that were given, as in `dimap.Budgets`.
        size: bytes of the output's files of weights, where there is a budget of them.
        nm: with groups, layer name -> "2:4", say; then there are no thresholds.

    A subclass has, as attributes or properties, by parameter name:

        shapes: of every parameter, "aux" included.
        kept: how many weights the masks keep, of every pruned parameter.
        nonzero: how many weights are not zero after pruning, of every parameter, "aux" included.
            Of a parameter that stacks layers, all of these of its slices, too: "down_proj[3]".
        smallest: the smallest kept magnitude of the parameter or of its layer; none where nothing
            is kept.
    """

    modules: dict[str, list[Layer]]
    thresholds: dict[str, float]
    scope: Scope
    normalize: Normalize
    sparsity: dict[str, float]
    saliency: str = "magnitude"
    notes: list[str] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    nm: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers = {name: len(found) for name, found in self.modules.items() if name != AUX}
        said = {"layers": layers, "scope": self.scope, "sparsity": self.sparsity} | self.asked
        return f"{type(self).__name__}({', '.join(f'{name}={x!r}' for name, x in said.items())})"

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
        if self.asked:
            found["asked"] = json.dumps(self.asked)
        if self.nm:
            found["nm"] = json.dumps(self.nm)
        found |= {f"sparsity.{name}": repr(s) for name, s in self.sparsity.items()}
        return found | {"addresses": json.dumps(self.places())}

    def places(self) -> dict[str, Address]:
        """Where the layer of each pruned parameter stands; of one that stacks layers, the first of them."""
        found: dict[str, Address] = {}
        for address, layer in addresses(self.modules).items():
            for name in layer.parameters:
                found.setdefault(whole(name), address)
        return found

    def report(
        self,
        model: nn.Module | Mapping[str, Tensor] | None = None,
        input_size: int | Sequence[int] | None = None,
    ) -> Report:
        """Tables of what is left; with `model`, FLOPs too (see `dimap.report.build_report`)."""
        return build_report(self, model, input_size)


NO_MODEL = "weights alone do not tell them, the nn.Module does"


def build_report(
    pruning: Pruned,
    model: nn.Module | Mapping[str, Tensor] | None = None,
    input_size: int | Sequence[int] | None = None,
    *,
    no_flops: str = NO_MODEL,
) -> Report:
    """Count what `pruning` removed.

    Args:
        pruning: what `dimap.prune` or `dimap.stream.prune_checkpoint` returned.
        model: the model that was pruned, for its FLOPs. An nn.Module with these names and shapes
            will do, on any device, the meta device too; a state dict has no FLOPs.
        input_size: as in `flops.count_flops`. Where it is None and the model does not say it, or
            the forward pass at the size it says fails, the report has no FLOPs and says why.
        no_flops: why there is no `model`; "" where nobody asks.

    Raises:
        ValueError: `model` is not the model that was pruned (names or shapes differ), or what was
            pruned is sharded (DTensor).
        RuntimeError: the forward pass at the given `input_size` failed.
    """
    dense_flops, flops, notes = count_dense(pruning, model, input_size, no_flops)
    # Of a pruning in memory each of these is counted when it is asked for: once.
    nonzero, smallest = pruning.nonzero, pruning.smallest
    weights = {name: math.prod(shape) for name, shape in pruning.shapes.items()}
    kept = {**weights, **pruning.kept}
    scopes = scope_names(pruning.modules, pruning.scope)

    def count(layer: Layer, density: Fraction) -> LayerReport:
        """density: kept share of the layer's module."""
        names = layer.parameters
        dense = [dense_flops[p] for p in names] if flops else []
        left = dense
        if layer.module != AUX:
            # Every weight of a matrix or a kernel meets equally many tokens: count / weights.
            left = [n and n * nonzero[p] // weights[p] for n, p in zip(dense, names, strict=False)]
        threshold = pruning.thresholds.get(scopes.get(layer.name, ""), math.nan)
        return LayerReport(
            name=layer.name,
            module=layer.module,
            stage=layer.stage,
            block=layer.block,
            parameters=tuple(map(str, names)),
            weights=sum(weights[p] for p in names),
            kept=sum(kept[p] for p in names),
            nonzero=sum(nonzero[p] for p in names),
            threshold=None if math.isnan(threshold) else threshold,
            smallest_kept=min((smallest[p] for p in names if p in smallest), default=None),
            flops_dense=sum(dense) if flops else None,
            flops_nominal=round(sum(dense) * density) if flops else None,
            flops=sum(left) if flops else None,
            tower=layer.tower,
            nm=pruning.nm.get(layer.name),
        )

    rows: list[LayerReport] = []
    modules: list[ModuleReport] = []
    for name in sorted(pruning.modules, key=AUX.__eq__):  # that one last
        names = [p for layer in pruning.modules[name] for p in layer.parameters]
        all_of_it, left = (sum(counts[p] for p in names) for counts in (weights, kept))
        density = Fraction(left, all_of_it) if all_of_it else Fraction(1)
        layers = [count(layer, density) for layer in pruning.modules[name]]
        rows += layers if name != AUX else []
        thresholds = {row.threshold for row in layers}
        shared = pruning.scope in ("module", "global") and len(thresholds) == 1
        threshold = thresholds.pop() if shared else None
        sums = _sums(layers, 0 if flops else None)
        modules.append(ModuleReport(name, len(layers), threshold=threshold, **sums))
    other = flops.total - sum(module.flops_dense or 0 for module in modules) if flops else None
    if rows and not any(row.nonzero for row in rows):
        before = ", as it was before" if any(row.kept for row in rows) else ""
        notes.append(
            f"every weight of all {len(rows)} layers is zero{before}: the blocks compute nothing"
        )
    elif empty := [row.name for row in rows if row.weights and not row.kept]:
        notes.append(f"{len(empty)} of {len(rows)} layers keep no weight, {empty[0]} is the first")
    if flops and (unused := [row.name for row in rows if row.weights and not row.flops_dense]):
        notes.append(f"no FLOPs were seen of {len(unused)} layers, {unused[0]} is the first")
    sums = _sums(modules, other)
    shares = {
        "flops": _share(sums.get("flops"), sums.get("flops_dense")),
        "nominal_flops": _share(sums.get("flops_nominal"), sums.get("flops_dense")),
        "params": _share(sums["kept"], sums["weights"]),
        "size": pruning.size,
    }
    return Report(
        scope=pruning.scope,
        normalize=pruning.normalize,
        sparsity=dict(pruning.sparsity),
        modules=tuple(modules),
        layers=tuple(rows),
        model=None if model is None or isinstance(model, Mapping) else type(model).__name__,
        input_size=flops.input_size if flops else None,
        flops_other=other,
        notes=(*notes, *pruning.notes),
        asked=dict(pruning.asked),
        got={name: got for name, got in shares.items() if name in pruning.asked},
        **sums,
    )


def _share(left: int | None, all_of_it: int | None) -> float | None:
    return left / all_of_it if left is not None and all_of_it else None


def _sums(parts: Sequence[LayerReport | ModuleReport], other: int | None) -> dict[str, Any]:
    """The counts of all parts together, and FLOPs with `other` that are of none; None: no FLOPs."""
    sums: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts) for name in ("weights", "kept", "nonzero")
    }
    if other is not None:
        for name in ("flops_dense", "flops_nominal", "flops"):
            sums[name] = other + sum(getattr(part, name) for part in parts)
    return sums


def count_dense(
    pruning: Pruned,
    model: nn.Module | Mapping[str, Tensor] | None,
    input_size: int | Sequence[int] | None,
    no_flops: str = NO_MODEL,
) -> tuple[dict[str, int], Flops | None, list[str]]:
    """The multiply-adds of every parameter and slice before pruning, and of the whole model.

    pruning: of which modules and shapes count. model, input_size, errors: as in `build_report`. Where
    there are no FLOPs: zeros, None, and a note that says why.
    """
    names_in = _names_in(pruning, model)
    flops, notes = _flops(model, input_size, no_flops)
    every = [p for layers in pruning.modules.values() for x in layers for p in x.parameters]
    pieces = Counter(map(whole, every))  # slices of each parameter; 1 where it is whole
    counted = flops.parameters if flops else {}
    dense = {p: counted.get(names_in.get(whole(p), ""), 0) // pieces[whole(p)] for p in every}
    return dense, flops, notes


def _names_in(pruning: Pruned, model: nn.Module | Mapping[str, Tensor] | None) -> dict[str, str]:
    """What the model that was pruned calls its parameters; what is never pruned it may lack."""
    if model is None:
        return {}
    shapes = {name: tuple(shape) for name, shape in pruning.shapes.items() if whole(name) == name}
    tensors: Mapping[str, Tensor] = (
        model
        if isinstance(model, Mapping)
        # Buffers too: a state dict that was pruned may hold some that look like parameters.
        else dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    )
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = {name: name for name, shape in shapes.items() if there.get(name) == shape}
    places = pruning.places()
    pruned = {name: shapes[name] for name in places}
    for given in (pruned if there.keys() & shapes.keys() else shapes, pruned):
        if pruned.keys() <= names.keys():
            break
        with suppress(ValueError):  # another spelling; what it lacks is said below
            for ours, theirs in same_weights(given, there, places):
                if len(ours) == len(theirs) == 1 and shapes[ours[0]] == there[theirs[0]]:
                    names[ours[0]] = theirs[0]
    claim = "model must be the one whose weights these are"
    have = Counter(map(kind_of, there))
    own = Counter(kind_of(names.get(name, name)) for name in shapes)
    for name, shape in shapes.items():
        if name not in names and (name in there or name in pruned):
            if name not in there and have[kind := kind_of(name)]:
                raise ValueError(
                    f"{claim}: it has {have[kind]} of {kind}, the weights have {own[kind]}"
                )
            got = there.get(name, "no such parameter")
            raise ValueError(f"{claim}: {name} must have shape {shape}, got {got}")
    known, found = {kind_of(names[name]) for name in pruned}, set(names.values())
    for name in there:
        kind = kind_of(name)
        if name not in found and kind in known:  # of a block that was not there
            raise ValueError(
                f"{claim}: it has {have[kind]} of {kind}, the weights have {own[kind]}"
            )
    return names


def _flops(
    model: nn.Module | Mapping[str, Tensor] | None,
    input_size: int | Sequence[int] | None,
    no_flops: str,
) -> tuple[Flops | None, list[str]]:
    """FLOPs, or a note that says why there are none."""
    if model is None or isinstance(model, Mapping):
        return None, [f"no FLOPs: {no_flops}"] if no_flops else []
    from ..flops import count_flops

    if input_size is not None:
        return count_flops(model, input_size), []
    try:
        return count_flops(model), []
    except (ValueError, RuntimeError) as error:
        return None, [f"no FLOPs: {error}"]
