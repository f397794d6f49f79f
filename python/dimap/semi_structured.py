"""Weights that are 2:4, in the form that torch multiplies faster where the device can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .groups import (
    Choice,
    Patterns,
    choose,
    group,
    named_tensors,
    prunable,
    shapes_of,
    tied_in,
    wholes,
)
from .groups.nm import input_axes
from .pruning import most_in_groups

__all__ = ["SemiStructured", "to_semi_structured"]

HALVES = (torch.float16, torch.bfloat16)


@dataclass
class SemiStructured:
    """What `to_semi_structured` did.

    converted: names of the weights that are now torch's sparse tensors.
    dense: name -> why it is as it was, of every other weight that can be pruned.
    """

    converted: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """How many, and each reason once, with how many have it and the first of them."""
        lines = [
            f"{len(self.converted)} of {len(self.converted) + len(self.dense)} weights are 2:4 now"
        ]
        for reason in dict.fromkeys(self.dense.values()):
            names = [name for name, why in self.dense.items() if why == reason]
            lines.append(f"{len(names)} dense, {names[0]} the first: {reason}")
        return "\n".join(lines)


def to_semi_structured(
    model: nn.Module,
    *,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> SemiStructured:
    """Give a model's 2:4 weights to `torch.sparse.to_sparse_semi_structured`, in place, for inference.

    model: pruned by `dimap.prune(model, nm="2:4")`, or with zeros like that. The weights that can be
        pruned are looked at, of which torch takes those of an `nn.Linear` alone, on CUDA from compute
        capability 8.0 on, of float16 or bfloat16, and of certain multiples of rows and columns. Each
        one's product stays that of the same numbers; torch rounds as its kernel does.
    patterns, family, ignore: see `find_modules`.

    Returns which weights were converted, and why the others were not: all reasons of each, joined by
    semicolons. A converted weight takes no gradient and is in no file of safetensors.

    Raises as `find_modules` does; TypeError for anything but an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    shapes = shapes_of(model)
    modules = group(shapes, choose(patterns, family, ignore), tied_in(model)).modules
    axes = input_axes(modules, shapes)
    parameters = named_tensors(model)
    done = SemiStructured()
    for name in wholes(p for layer in prunable(modules) for p in layer.parameters):
        weight = parameters[name]
        owner = model.get_submodule(name.rpartition(".")[0])
        reasons = _reasons(model, owner, weight, axes.get(name))
        if not reasons:
            try:
                sparse = torch.sparse.to_sparse_semi_structured(weight.detach())
                if not torch.equal(sparse.to_dense(), weight.detach()):
                    reasons = ["torch does not give the same numbers back"]
            except (RuntimeError, NotImplementedError) as error:
                reasons = [f"torch says: {str(error).splitlines()[0]}"]
        if reasons:
            done.dense[name] = "; ".join(reasons)
        else:
            owner.weight = nn.Parameter(sparse, requires_grad=False)
            done.converted.append(name)
    return done


def _reasons(model: nn.Module, owner: nn.Module, weight: Tensor, axis: int | None) -> list[str]:
    """Why a weight is left dense; empty where it seems to be torch's to convert."""
    reasons = []
    if type(owner) is not nn.Linear:
        reasons.append(f"its module is {type(owner).__name__}, torch takes nn.Linear alone")
    elif sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        reasons.append("another module has it, too")
    if axis is None:
        reasons.append("it stacks several layers")
    elif weight.is_meta:
        reasons.append("it holds no numbers, on the meta device")
    elif (most := most_in_groups(weight, axis)[4]) > 2:
        fits = weight.shape[axis] % 4 == 0
        reasons.append(
            f"it is not 2:4, but {most}:4"
            if fits
            else f"4 does not divide its {weight.shape[axis]} inputs"
        )
    if not weight.is_cuda:
        reasons.append(f"it is on {weight.device.type}, torch's 2:4 runs on CUDA")
    elif (has := torch.cuda.get_device_capability(weight.device)) < (8, 0):
        reasons.append(f"its device has compute capability {has[0]}.{has[1]}, 8.0 is needed")
    if weight.dtype not in HALVES:
        got = str(weight.dtype).removeprefix("torch.")
        reasons.append(f"it is {got}, torch takes float16 and bfloat16")
    elif (least := _multiples(weight.dtype)) and any(
        size % of for size, of in zip(weight.shape, least, strict=False)
    ):
        got = " x ".join(map(str, weight.shape))
        reasons.append(f"it is {got}, torch takes multiples of {least[0]} x {least[1]}")
    return reasons


def _multiples(dtype: torch.dtype) -> tuple[int, int] | None:
    """Of how many rows and columns a weight must be a multiple, where torch tells."""
    cutlass = getattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    kind = f"SparseSemiStructuredTensor{'CUTLASS' if cutlass else 'CUSPARSELT'}"
    known = getattr(getattr(torch.sparse, kind, None), "_DTYPE_SHAPE_CONSTRAINTS", {})
    found = known.get(dtype)
    return (found.sparse_min_rows, found.sparse_min_cols) if found else None
