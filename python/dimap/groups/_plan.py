"""A model's prunable tensors, numbered for the operators: what is ranked with what, and how many stay."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from . import AUX, Layer, Patterns, find_modules
from ._scopes import Scope, block_name, scope_names

Normalize = Literal["layer", "block", "stage", "module", "scope"]
Model = nn.Module | Mapping[str, Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Plan:
    """A model's prunable tensors, numbered for the operators."""

    modules: dict[str, list[Layer]]
    names: list[str]
    tensors: list[Tensor]
    layers: list[int]  # of each tensor: where its squares are summed
    scopes: list[int]  # of each tensor: where it is ranked
    scope_names: list[str]
    scope_modules: list[str | None]  # the module whose sparsity each scope has; None: the network's

    @staticmethod
    def of(model: Model, scope: str, normalize: str, patterns: Patterns | None) -> Plan:
        check_choice("scope", scope, get_args(Scope))
        check_choice("normalize", normalize, get_args(Normalize))
        modules = find_modules(model, patterns)
        parameters = parameters_of(model)
        plan = Plan(modules, [], [], [], [], [], [])
        of_layer = scope_names(modules, scope)
        groups: dict[tuple[str, ...], int] = {}
        scopes: dict[str, int] = {}
        for module, layer in ((m, x) for m, xs in modules.items() if m != AUX for x in xs):
            name = of_layer[layer.name]
            if name not in scopes:
                scopes[name] = len(scopes)
                plan.scope_names.append(name)
                whole = scope in ("global", "block", "stage")
                plan.scope_modules.append(None if whole else module)
            # A sum never reaches beyond the scope in which its scores are compared.
            key = (name, *_group_key(layer, module, "layer" if scope == "layer" else normalize))
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
            raise ValueError(
                "sparsity must be one number where a scope holds several modules "
                "(scope='global', 'block' or 'stage'), got one per module"
            )
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

    def ranked(self, saliency: Mapping[str, Tensor]) -> list[Tensor]:
        """The saliency of each tensor, checked: it takes the place of the magnitudes."""
        given: object = saliency  # callers are not bound by the annotation
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise TypeError(f"saliency must be a mapping of names to tensors, got {kind}")
        known = {p for layers in self.modules.values() for x in layers for p in x.parameters}
        if odd := [name for name in saliency if name not in known]:
            raise ValueError(f"saliency must be under the model's parameters, got {odd[0]!r}")
        if missing := [name for name in self.names if name not in saliency]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"saliency must have every prunable parameter, got none for {missing[0]}{more}"
            )
        for name, weight in zip(self.names, self.tensors, strict=True):
            value: object = saliency[name]
            if not isinstance(value, Tensor):
                raise TypeError(f"saliency of {name} must be a tensor, got {type(value).__name__}")
            if value.shape != weight.shape:
                got = f"{tuple(weight.shape)}, got {tuple(value.shape)}"
                raise ValueError(f"saliency of {name} must have shape {got}")
            if value.dtype not in _DTYPES:
                got = str(value.dtype).removeprefix("torch.")
                raise ValueError(
                    f"saliency of {name} must be float32, bfloat16 or float16, got {got}"
                )
            if value.device != weight.device:
                raise ValueError(
                    f"saliency of {name} must be on {weight.device} like its weight, "
                    f"got {value.device}"
                )
            if bool((negative := value.detach().flatten() < 0).any()):
                at = int(negative.int().argmax())
                got = f"{float(value.detach().flatten()[at]):g} at flat index {at}"
                raise ValueError(f"saliency of {name} must not be negative, got {got}")
        return [saliency[name].detach() for name in self.names]


def _group_key(layer: Layer, module: str, normalize: str) -> tuple[str, ...]:
    if normalize == "scope":
        return ()
    if normalize == "module":
        return (module,)
    if normalize == "layer":
        return (module, layer.name)
    kind: Literal["block", "stage"] = "block" if normalize == "block" else "stage"
    return (module, block_name(layer, kind, "normalize", normalize))


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def parameters_of(model: Model) -> dict[str, Tensor]:
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model.items())


@contextmanager
def renamed(names: Sequence[str]) -> Iterator[None]:
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
