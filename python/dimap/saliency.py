"""What weights are ranked by: a non-negative number for each, high where it is to be kept.

Every function here returns parameter name -> float32 tensor of the parameter's shape and device, for
the prunable parameters; `dimap.select` and `dimap.prune` take it as `saliency`, or any other such
mapping. Zero weights have saliency 0 in all but `random`.

>>> dimap.prune(model, 0.5, scope="global", saliency=dimap.saliency.taylor(model, batches))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import Choice, Model, Patterns, named_tensors, shapes_of, tied_in, wholes
from .groups.plan import Plan

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Batches: TypeAlias = Iterable[tuple[Any, Any]]

__all__ = ["Batches", "Loss", "magnitude", "random", "snip", "taylor"]


def magnitude(model: Model, *, patterns: Patterns | Choice | None = None) -> dict[str, Tensor]:
    """The magnitudes of the weights, ``abs(w)``: what `dimap.select` ranks by where no saliency is given.

    model, patterns: as in `dimap.find_modules`.
    """
    return {name: w.detach().float().abs() for name, w in _prunable(model, patterns).items()}


def random(
    model: Model, seed: int = 0, *, patterns: Patterns | Choice | None = None
) -> dict[str, Tensor]:
    """Uniform random numbers in [0, 1), the same for the same seed and shapes on every device.

    model, patterns: as in `dimap.find_modules`.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(w.shape, generator=generator).to(w.device)
        for name, w in _prunable(model, patterns).items()
    }


def taylor(
    model: nn.Module,
    data: Batches,
    loss: Loss | None = None,
    *,
    patterns: Patterns | Choice | None = None,
) -> dict[str, Tensor]:
    """First-order change of the loss when a weight is removed, ``abs(w · ∂L/∂w)``, mean over batches.

    model: run in evaluation mode; its weights, gradients and modes are as before afterwards.
    data: batches ``(input, target)`` of tensors, moved to the device of the weights. A few suffice.
    loss: from output and target to a scalar, `torch.nn.functional.cross_entropy` by default.
    patterns: as in `dimap.find_modules`.

    Weights that the loss does not depend on have saliency 0. Raises ValueError for no batches,
    TypeError for a state dict.

    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, for
    single weights, with the absolute value in place of the square.
    """
    _, sums, count = _sum_over_batches(
        model, data, loss, patterns, lambda w, gradient: (w * gradient).abs_()
    )
    return {name: total.div_(count) for name, total in sums.items()}


def snip(
    model: nn.Module,
    data: Batches,
    loss: Loss | None = None,
    *,
    patterns: Patterns | Choice | None = None,
) -> dict[str, Tensor]:
    """Connection sensitivity ``|g| / Σ|g|``, g = ∂L/∂c = w · ∂L/∂w for a factor c = 1 on a weight.

    The batches are taken as one: their gradients are averaged before the absolute value, where
    `taylor` averages after it. On one batch the two rank alike. SNIP prunes before training; on trained
    weights gradients are small and noisy, so more data helps.

    Arguments and errors as in `taylor`. All prunable weights together sum to 1 (0 where no gradient is).

    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019.
    """
    weights, sums, _ = _sum_over_batches(model, data, loss, patterns, lambda _, gradient: gradient)
    for name, total in sums.items():
        total.mul_(weights[name].detach()).abs_()
    whole = sum(float(total.sum(dtype=torch.float64)) for total in sums.values())
    # One float64 factor: a float32 one could underflow where the gradients are tiny.
    return {n: (t.double() / whole).float() if whole else t for n, t in sums.items()}


def _sum_over_batches(
    model: nn.Module,
    data: Batches,
    loss: Loss | None,
    patterns: Patterns | Choice | None,
    term: Callable[[Tensor, Tensor], Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The weights; the sums of `term` of weights and gradients, float32; the number of batches.

    A batch adds nothing to weights that its loss does not depend on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, to have gradients, got {type(model).__name__}"
        )
    weights = _prunable(model, patterns)
    sums = {name: torch.zeros(w.shape, device=w.device) for name, w in weights.items()}
    device = next(iter(weights.values())).device
    count = 0
    with _evaluating(model, weights):
        for inputs, targets in data:
            count += 1
            with torch.enable_grad():
                value = (loss or F.cross_entropy)(model(_to(inputs, device)), _to(targets, device))
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"loss must give a scalar tensor, got {got}")
                found = torch.autograd.grad(value.sum(), list(weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(weights.items(), found, strict=True):
                if gradient is not None:
                    sums[name] += term(weight.detach().float(), gradient.detach().float())
    if not count:
        raise ValueError("data must hold at least one batch, got none")
    return weights, sums, count


@contextmanager
def _evaluating(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluation mode, and gradients for the weights, frozen or not."""
    training = [module for module in model.modules() if module.training]
    frozen = [w for w in weights.values() if not w.requires_grad]
    model.eval()
    for w in frozen:
        w.requires_grad_(True)
    try:
        yield
    finally:
        for w in frozen:
            w.requires_grad_(False)
        for module in training:
            module.training = True


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _prunable(model: Model, patterns: Patterns | Choice | None) -> dict[str, Tensor]:
    ties = tied_in(model)
    names = Plan.of_shapes(shapes_of(model), "layer", "layer", patterns, ties).names
    tensors = named_tensors(model)
    return {name: tensors[name] for name in wholes(names)}
