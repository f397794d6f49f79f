"""A model's prunable tensors, numbered for the operators: what is ranked with what, and how many stay."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from .._dtypes import BY_NAME
from .._errors import way_out
from . import (
    AUX,
    COSTLY,
    Choice,
    Layer,
    Located,
    Model,
    Patterns,
    Slice,
    group,
    named_tensors,
    part_of,
    part_shape,
    prunable,
    shapes_of,
    tied_in,
    whole,
    wholes,
)
from .nm import NM, as_groups, as_rows, input_axes, leave_ragged, round_kept
from .tied import check_apart

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["module", "global", "layer", "type", "block", "stage", "row"]
Normalize = Literal["layer", "block", "stage", "module", "scope"]
# One share of weights to drop, one for each module, or how it is found: "auto", or none where a budget
# says it.
Sparsity: TypeAlias = "float | Mapping[str, float] | str | None"


@dataclass
class Plan:
    """A model's prunable tensors in the order in which ties are kept, numbered for the operators.

    modules: all layers, as `find_modules` groups them.
    names, sizes: of each tensor, its name in its layer and how many weights it has. A parameter that
        stacks layers is as many tensors, its slices.
    notes: what the user should know of the grouping, one sentence each.
    tensors: the tensors themselves; empty where the plan was made of names and shapes.
    nm: N:M in place of scopes, or beside them where they say which N; None: neither.
    axes, inners: with it, of each tensor the axis of its groups, counted from the end, and how many
        weights lie behind that.
    rows: with scope "row", of each tensor `as_rows`; its `axes` then say what a row is.
    """

    modules: dict[str, list[Layer]]
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)  # of each tensor: where its squares are summed
    scopes: list[int] = field(default_factory=list)  # of each tensor: where it is ranked
    scope_names: list[str] = field(default_factory=list)
    # of each scope: the module whose sparsity it has; None: the network's
    scope_modules: list[str | None] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    tensors: list[Tensor] = field(default_factory=list)
    nm: NM | None = None
    axes: list[int] = field(default_factory=list)
    inners: list[int] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)

    @staticmethod
    def of_shapes(
        shapes: Mapping[str, tuple[int, ...]],
        scope: str,
        normalize: str,
        patterns: Patterns | Choice | None = None,
        ties: Sequence[tuple[str, ...]] = (),
        nm: NM | None = None,
    ) -> Plan:
        """Plan for parameters of these names and shapes, of which no weight is looked at.

        ties: as in `group`. nm: layers that its groups do not fit are left dense, with a note.
        """
        check_choice("scope", scope, get_args(Scope))
        check_choice("normalize", normalize, get_args(Normalize))
        grouping = group(shapes, patterns, ties)
        modules = grouping.modules
        notes = (*grouping.notes, COSTLY) if grouping.costly else grouping.notes
        plan, axes = Plan(modules, notes=notes, nm=nm), dict[str, int]()
        if nm is not None:
            plan.modules, axes, ragged = leave_ragged(modules, shapes, nm.m)
            modules, plan.notes = plan.modules, (*plan.notes, *ragged)
        elif scope == "row":
            axes = input_axes(modules, shapes)
        of_layer = scope_names(modules, scope)
        groups: dict[tuple[str, ...], int] = {}
        scopes: dict[str, int] = {}
        for module, layer in plan.prunable():
            name = of_layer[layer.name]
            if name not in scopes:
                scopes[name] = len(scopes)
                plan.scope_names.append(name)
                whole = scope in ("global", "block", "stage")
                plan.scope_modules.append(None if whole else module)
            # A sum never reaches beyond the scope in which its scores are compared.
            key = (
                name,
                *_group_key(layer, module, "layer" if scope in ("layer", "row") else normalize),
            )
            number = groups.setdefault(key, len(groups))
            for parameter in layer.parameters:
                plan.names.append(parameter)
                shape = part_shape(shapes, parameter)
                plan.sizes.append(math.prod(shape))
                if axes:
                    plan.axes.append(axes[parameter])
                    plan.inners.append(as_groups(shape, axes[parameter])[2])
                if scope == "row":
                    plan.rows.append(as_rows(shape, axes[parameter]))
                plan.layers.append(number)
                plan.scopes.append(scopes[name])
        if not plan.names:
            raise ValueError("the model must have a module to prune, got only 'aux'")
        return plan

    @staticmethod
    def of(
        model: Model,
        scope: str,
        normalize: str,
        patterns: Patterns | Choice | None = None,
        nm: NM | None = None,
    ) -> Plan:
        """Plan for a model or a state dict, with its tensors."""
        plan = Plan.of_shapes(shapes_of(model), scope, normalize, patterns, tied_in(model), nm)
        parameters = named_tensors(model)
        for name in plan.names:
            if isinstance(name, Slice) and hasattr(parameters[name.parameter], "placements"):
                raise ValueError(
                    f"{name.parameter} must be whole to be pruned expert by expert, got a DTensor: "
                    "prune the checkpoint with `torchrun ... -m dimap prune` instead"
                )
        plan.tensors = [part_of(parameters, name).detach() for name in plan.names]
        check_apart(plan.names, plan.tensors)
        for name, tensor in zip(plan.names, plan.tensors, strict=True):
            if tensor.is_meta:
                raise ValueError(f"{name} must hold weights, got a tensor on the meta device")
        return plan

    def prunable(self) -> list[tuple[str, Layer]]:
        """The layers that are pruned, each with its module."""
        return [(layer.module, layer) for layer in prunable(self.modules)]

    def layer_of_tensors(self) -> list[tuple[str, Layer]]:
        """The module and the layer of each tensor."""
        return [(m, layer) for m, layer in self.prunable() for _ in layer.parameters]

    def merged(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """What was computed for each tensor, by parameter: slices are stacked again."""
        import torch

        parts: dict[str, list[Tensor]] = {}
        for name, value in zip(self.names, values, strict=True):
            parts.setdefault(whole(name), []).append(value)
        stacked = {name.parameter for name in self.names if isinstance(name, Slice)}
        return {n: torch.stack(p) if n in stacked else p[0] for n, p in parts.items()}

    def keep(self, sparsity: Sparsity) -> list[int]:
        """How many weights each scope keeps."""
        if isinstance(sparsity, Mapping) and None in self.scope_modules:
            raise ValueError(
                "sparsity must be one number where a scope holds several modules "
                "(scope='global', 'block' or 'stage'), got one per module"
            )
        ratios = self.ratios(sparsity)
        if self.rows:
            kept = [0] * len(self.scope_names)
            each = zip(self.rows, self.of_rows(ratios), self.scopes, strict=True)
            for (rows, n, _), share, scope in each:
                kept[scope] += rows * kept_of(n, share)
            return kept
        totals = [0] * len(self.scope_names)
        for size, scope in zip(self.sizes, self.scopes, strict=True):
            totals[scope] += size
        first = next(iter(ratios.values()))
        return [
            kept_of(n, first if module is None else ratios[module])
            for n, module in zip(totals, self.scope_modules, strict=True)
        ]

    def of_rows(self, ratios: Mapping[str, float]) -> list[float]:
        """The ratio of each tensor's rows, with scope "row"."""
        return [ratios[self.scope_modules[scope] or ""] for scope in self.scopes]

    def ratios(self, sparsity: Sparsity) -> dict[str, float]:
        """The ratio of each prunable module, checked; None is what the caller forgot."""
        names = [name for name in self.modules if name != AUX]
        if sparsity is None:
            raise TypeError(
                "prune needs sparsity as 0.5 or '50%', or nm as '2:4', or a budget as flops=0.6, got none"
            )
        if sparsity == "auto":
            raise TypeError("sparsity must be a number where no budget shares it out, got auto")
        given: dict[str, Any]
        if isinstance(sparsity, Mapping):
            if set(sparsity) != set(names):
                lacks = f", none for {', '.join(n for n in names if n not in sparsity)}"
                raise ValueError(
                    f"sparsity must have one number for each of the modules {', '.join(names)} (0 keeps a "
                    f"module as it is), got {', '.join(map(str, sparsity)) or 'none'}"
                    + (lacks if set(names) - set(sparsity) else "")
                )
            given = {name: sparsity[name] for name in names}
        else:
            given = dict.fromkeys(names, sparsity)
        for name, value in given.items():
            where = f"sparsity[{name!r}]" if isinstance(sparsity, Mapping) else "sparsity"
            given[name] = share(where, value)
        return given

    def counts(self, kept: Sequence[int] = ()) -> dict[str, int]:
        """The N of each layer by name.

        kept: for nm "auto", how many weights `select` keeps of each tensor.
        """
        assert self.nm is not None
        layers = prunable(self.modules)
        if self.nm.n is not None:
            return dict.fromkeys((x.name for x in layers), self.nm.n)
        of = {name: i for i, name in enumerate(self.names)}
        counts: dict[str, int] = {}
        for scope in range(len(self.scope_names)):
            here = [x for x in layers if self.scopes[of[x.parameters[0]]] == scope]
            share, whole = (
                [sum(numbers[of[p]] for p in x.parameters) for x in here]
                for numbers in (kept, self.sizes)
            )
            rounded = round_kept(share, whole, self.nm.m)
            counts |= zip((x.name for x in here), rounded, strict=True)
        return counts

    def by_tensor(self, counts: Mapping[str, int]) -> list[int]:
        """What is said of layers by name, of each tensor."""
        return [counts[layer.name] for _, layer in self.layer_of_tensors()]

    def ranked(self, saliency: Mapping[str, Tensor]) -> list[Tensor]:
        """The saliency of each tensor, checked: it takes the place of the magnitudes."""
        from torch import Tensor

        given: object = saliency  # callers are not bound by the annotation
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise TypeError(f"saliency must be a mapping of names to tensors, got {kind}")
        known = {whole(p) for found in self.modules.values() for x in found for p in x.parameters}
        if odd := [name for name in saliency if name not in known]:
            raise ValueError(f"saliency must be under the model's parameters, got {odd[0]!r}")
        if missing := [name for name in wholes(self.names) if name not in saliency]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"saliency must have every prunable parameter, got none for {missing[0]}{more}"
            )
        for name, weight in zip(self.names, self.tensors, strict=True):
            value: object = saliency[whole(name)]
            if not isinstance(value, Tensor):
                raise TypeError(f"saliency of {name} must be a tensor, got {type(value).__name__}")
            problem = ""
            if isinstance(name, Slice) and value.ndim and name.at < len(value):
                value = value[name.at]
            if value.shape != weight.shape:
                problem = f"have shape {tuple(weight.shape)}, got {tuple(value.shape)}"
            elif (got := str(value.dtype).removeprefix("torch.")) not in BY_NAME:
                problem = f"be float32, bfloat16 or float16, got {got}"
            elif value.device != weight.device:
                problem = f"be on {weight.device} like its weight, got {value.device}"
            elif hasattr(value, "placements"):  # each rank looks at its own
                pass
            elif bool((negative := value.detach().flatten() < 0).any()):
                at = int(negative.int().argmax())
                got = f"{float(value.detach().flatten()[at]):g} at flat index {at}"
                problem = f"not be negative, got {got}"
            if problem:
                raise ValueError(f"saliency of {name} must {problem}")
        return [part_of(saliency, name).detach() for name in self.names]


def share(name: str, value: object) -> float:
    """A share in [0, 1]: a number, or text as "60%". name: of the argument, for errors.

    Raises TypeError for what is neither, ValueError for other text and for what is out of range.
    """
    number: object = value
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            problem = f"{name} must be a share as 0.6 or 60%, got {value!r}"
            raise ValueError(problem.lstrip()) from None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= number <= 1:  # nor a NaN
        hint = (
            f": {number:g} % is {number / 100:g}"
            if 1 < number <= 100 and "%" not in str(value)
            else ""
        )
        raise ValueError(f"{name} must be in [0, 1], got {value}{hint}".lstrip())
    return float(number)


def kept_of(n: int, share: float) -> int:
    """How many of `n` weights are kept where a share of them is dropped, with Python's round."""
    return n - round(share * n)


def scope_names(modules: Mapping[str, Sequence[Located]], scope: str) -> dict[str, str]:
    """Layer name -> name of the scope that the layer is ranked in; "aux" left out.

    "module": the module's name. "global": "global". "layer", "row": the layer's name. "type": the module's
    name, with the layer's place in its block where a block has several: "mlp.1" is every FC1,
    "mlp.2" every FC2. "block": "stage 0 block 1", or "block 1" where there are no stages. "stage":
    "stage 0", which is the whole network where there are none; "text stage 0" in a tower.

    Raises ValueError where a layer lacks the number that its scope is named after.
    """
    names: dict[str, str] = {}
    for module, layers in modules.items():
        if module == AUX:
            continue
        seen: Counter[tuple[str, int | None, int | None]] = Counter()
        for layer in layers:
            if scope in ("block", "stage"):
                names[layer.name] = block_name(layer, scope, "scope", scope)
            elif scope == "type":
                block_name(layer, "block", "scope", scope)  # or the error that it has none
                place = layer.tower, layer.stage, layer.block
                seen[place] += 1
                names[layer.name] = f"{module}.{seen[place]}"
            else:
                own = {"module": module, "layer": layer.name, "row": layer.name}
                names[layer.name] = own.get(scope, scope)
        if scope == "type" and max(seen.values(), default=0) <= 1:
            names.update(dict.fromkeys((layer.name for layer in layers), module))
    return names


def block_name(layer: Located, kind: str, argument: str, value: str) -> str:
    """A layer's "block" or "stage" in words. argument, value: what asks for it, for the error."""
    # A model of one stage numbers its blocks only.
    if layer.block is None and (kind == "block" or layer.stage is None):
        raise ValueError(
            f"{argument}={value!r} needs the {kind} of every prunable layer, "
            f"got none for {layer.name}: name it in the patterns, as (?P<{kind}>...)"
        )
    tower = f"{layer.tower} " if layer.tower else ""
    if kind == "stage":
        return f"{tower}stage {layer.stage or 0}"
    where = f"block {layer.block}"
    return tower + (where if layer.stage is None else f"stage {layer.stage} {where}")


def _group_key(layer: Layer, module: str, normalize: str) -> tuple[str, ...]:
    if normalize in ("block", "stage"):
        return (module, block_name(layer, normalize, "normalize", normalize))
    keys = {"scope": (), "module": (module,), "layer": (module, layer.name)}
    return keys[normalize]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@contextmanager
def renamed(names: Sequence[str]) -> Iterator[None]:
    """Say the parameter's name where an operator's error says ``weights[3]``."""
    try:
        yield
    except RuntimeError as error:
        # What torch puts around the message (function, file and line, stack) is left behind.
        found = re.search(r"weights\[(\d+)\] (must .*)", str(error))
        if found is None:
            raise
        others = re.sub(r"weights\[(\d+)\]", lambda m: names[int(m[1])], found[2])
        problem = f"{names[int(found[1])]} {others}"
        raise ValueError(problem + way_out(problem)) from error
