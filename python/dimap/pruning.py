"""Score, select and prune a whole model: names in, masks out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn

from . import ops
from .groups import AUX, Layer, Patterns, find_modules

if TYPE_CHECKING:
    from .report import Report

Scope = Literal["module", "global", "layer"]
Normalize = Literal["layer", "block", "stage", "module"]
Model = nn.Module | Mapping[str, Tensor]

__all__ = ["Normalize", "Pruning", "Scope", "prune", "score", "select"]


def score(
    model: Model, *, normalize: Normalize = "layer", patterns: Patterns | None = None
) -> dict[str, Tensor]:
    """Score every prunable weight of a model (Eq. 10 of the DIMAP paper).

    model: an nn.Module or a state dict; float32, bfloat16 or float16 weights on one device.
    normalize: where the squares are summed: over a layer (the paper), or over the layers of one
        module that stand in the same block, in the same stage, or all of them.
    patterns: see `find_modules`.

    Returns parameter name -> float32 tensor of the parameter's shape.
    """
    plan = _Plan.of(model, "module", normalize, patterns)
    with _named(plan.names):
        scores = ops.score(plan.tensors, plan.layers)
    return dict(zip(plan.names, scores, strict=True))


def select(
    model: Model,
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
) -> dict[str, Tensor]:
    """Return the masks that prune a model, without changing it.

    sparsity: the share of weights to drop, in [0, 1]: one number, or one for each module by name.
    scope: where one threshold holds: "module" (the paper), "global" (one for the network: LAMP) or
        "layer" (the same ratio in every layer: uniform magnitude; `normalize` changes nothing).
    normalize, patterns: as in `score`. normalize="module" with scope="global" lets whole modules
        compete: sorted, normalised and cut together.

    Returns parameter name -> bool tensor, True where the weight is kept. In each scope of N weights
    exactly ``N - round(sparsity * N)`` are kept. Parameters of "aux" are not in it.
    """
    plan = _Plan.of(model, scope, normalize, patterns)
    keep = plan.keep(sparsity)
    with _named(plan.names):
        masks = ops.select(plan.tensors, plan.layers, plan.scopes, keep)
    return dict(zip(plan.names, masks, strict=True))


def prune(
    model: Model,
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
) -> Pruning:
    """Prune a model in place: what `select` drops becomes zero. Arguments as in `select`.

    Nothing is changed when an error is raised.
    """
    plan = _Plan.of(model, scope, normalize, patterns)
    keep = plan.keep(sparsity)
    with _named(plan.names):
        masks, thresholds = ops.select_cuts(plan.tensors, plan.layers, plan.scopes, keep)
        ops.apply_(plan.tensors, masks)
    return Pruning(
        masks=dict(zip(plan.names, masks, strict=True)),
        modules=plan.modules,
        thresholds=dict(zip(plan.scope_names, thresholds.tolist(), strict=True)),
        scope=scope,
        normalize=normalize,
        sparsity=plan.ratios(sparsity),
        parameters=_parameters(model),
    )


@dataclass
class Pruning:
    """What was pruned.

    masks: parameter name -> bool tensor, True where the weight is kept.
    modules: what `find_modules` gave, "aux" included.
    thresholds: the smallest kept score64 of each scope: by module name, by layer name, or under
        "global"; NaN where nothing is kept.
    sparsity: module name -> the ratio asked for.
    parameters: every parameter of the model, "aux" included: the model's own tensors.
    """

    masks: dict[str, Tensor]
    modules: dict[str, list[Layer]]
    thresholds: dict[str, float]
    scope: Scope
    normalize: Normalize
    sparsity: dict[str, float]
    parameters: dict[str, Tensor] = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return {name: tuple(p.shape) for name, p in self.parameters.items()}

    @property
    def nonzero(self) -> dict[str, int]:
        """How many weights of every parameter are not zero now."""
        return {name: count_nonzero(p) for name, p in self.parameters.items()}

    def report(
        self, model: nn.Module | None = None, input_size: int | Sequence[int] | None = None
    ) -> Report:
        """Tables of what is left; with `model`, FLOPs too (see `dimap.report.build_report`)."""
        from .report import build_report

        return build_report(self, model, input_size)

    def save_masks(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, one bit a weight (see `dimap.load_masks`)."""
        from .masks import save_masks

        settings: dict[str, str] = {"scope": self.scope, "normalize": self.normalize}
        settings |= {f"sparsity.{name}": repr(s) for name, s in self.sparsity.items()}
        save_masks(path, self.masks, settings)


@dataclass
class _Plan:
    """A model's prunable tensors, numbered for the operators."""

    modules: dict[str, list[Layer]]
    names: list[str]
    tensors: list[Tensor]
    layers: list[int]  # of each tensor: where its squares are summed
    scopes: list[int]  # of each tensor: where it is ranked
    scope_names: list[str]
    scope_modules: list[str | None]  # the module of each scope; None: all of them

    @staticmethod
    def of(model: Model, scope: str, normalize: str, patterns: Patterns | None) -> _Plan:
        _check_choice("scope", scope, get_args(Scope))
        _check_choice("normalize", normalize, get_args(Normalize))
        modules = find_modules(model, patterns)
        parameters = _parameters(model)
        plan = _Plan(modules, [], [], [], [], [], [])
        groups: dict[tuple[object, ...], int] = {}
        scopes: dict[str, int] = {}
        for module, layer in ((m, x) for m, xs in modules.items() if m != AUX for x in xs):
            name = {"module": module, "global": "global", "layer": layer.name}[scope]
            if name not in scopes:
                scopes[name] = len(scopes)
                plan.scope_names.append(name)
                plan.scope_modules.append(None if scope == "global" else module)
            key = _group_key(layer, module, "layer" if scope == "layer" else normalize)
            group = groups.setdefault(key, len(groups))
            for parameter in layer.parameters:
                plan.names.append(parameter)
                plan.tensors.append(parameters[parameter].detach())
                plan.layers.append(group)
                plan.scopes.append(scopes[name])
        if not plan.names:
            raise ValueError("the model must have a module to prune, got only 'aux'")
        for name, tensor in zip(plan.names, plan.tensors, strict=True):
            if tensor.is_meta:
                raise ValueError(f"{name} must hold weights, got a tensor on the meta device")
        return plan

    def keep(self, sparsity: float | Mapping[str, float]) -> list[int]:
        """How many weights each scope keeps."""
        if isinstance(sparsity, Mapping) and None in self.scope_modules:
            raise ValueError("sparsity must be one number with scope='global', got one per module")
        ratios = self.ratios(sparsity)
        totals = [0] * len(self.scope_names)
        for tensor, scope in zip(self.tensors, self.scopes, strict=True):
            totals[scope] += tensor.numel()
        first = next(iter(ratios.values()))
        return [
            n - round((first if module is None else ratios[module]) * n)
            for n, module in zip(totals, self.scope_modules, strict=True)
        ]

    def ratios(self, sparsity: float | Mapping[str, float]) -> dict[str, float]:
        """The ratio of each prunable module, checked."""
        names = [name for name in self.modules if name != AUX]
        if isinstance(sparsity, Mapping):
            if set(sparsity) != set(names):
                raise ValueError(
                    f"sparsity must have one number for each of the modules {', '.join(names)}, "
                    f"got {', '.join(map(str, sparsity)) or 'none'}"
                )
            given = {name: sparsity[name] for name in names}
        else:
            given = dict.fromkeys(names, sparsity)
        for name, value in given.items():
            where = f"sparsity[{name!r}]" if isinstance(sparsity, Mapping) else "sparsity"
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{where} must be a number, got {type(value).__name__}")
            if not 0 <= value <= 1 or math.isnan(value):
                raise ValueError(f"{where} must be in [0, 1], got {value}")
        return {name: float(value) for name, value in given.items()}


def count_nonzero(tensor: Tensor) -> int:
    """How many values are not zero."""
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch cannot count float8
        tensor = tensor.float()
    return int(tensor.count_nonzero())


def _group_key(layer: Layer, module: str, normalize: str) -> tuple[object, ...]:
    if normalize == "module":
        return (module,)
    if normalize == "layer":
        return (module, layer.name)
    # A model of one stage numbers its blocks only.
    if layer.block is None and (normalize == "block" or layer.stage is None):
        raise ValueError(
            f"normalize={normalize!r} needs the {normalize} of every prunable layer, "
            f"got none for {layer.name}: name it in the patterns, as (?P<{normalize}>...)"
        )
    if normalize == "stage":
        return (module, layer.stage)
    return (module, layer.stage, layer.block)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _parameters(model: Model) -> dict[str, Tensor]:
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model.items())


@contextmanager
def _named(names: Sequence[str]) -> Iterator[None]:
    """Say the parameter's name where an operator's error says ``weights[3]``."""
    try:
        yield
    except RuntimeError as error:
        # What torch puts around the message (function, file and line, stack) is left behind.
        found = re.search(r"weights\[(\d+)\] (must be .*)", str(error))
        if found is None:
            raise
        others = re.sub(r"weights\[(\d+)\]", lambda m: names[int(m[1])], found[2])
        raise ValueError(f"{names[int(found[1])]} {others}") from error
