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

from .groups import AUX, Choice, Patterns, find_modules, wholes

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Batches: TypeAlias = Iterable[tuple[Any, Any]]

__all__ = ["Batches", "Loss", "magnitude", "random", "snip", "taylor"]


def magnitude(
    model: nn.Module | Mapping[str, Tensor], *, patterns: Patterns | Choice | None = None
) -> dict[str, Tensor]:
    """The magnitudes of the weights, |w|: what `dimap.select` ranks by where no saliency is given.

    model, patterns: as in `dimap.find_modules`.
    """
    return {name: w.detach().float().abs() for name, w in _prunable(model, patterns).items()}


def random(
    model: nn.Module | Mapping[str, Tensor],
    seed: int = 0,
    *,
    patterns: Patterns | Choice | None = None,
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
    """First-order change of the loss when a weight is removed, |w · ∂L/∂w|, averaged over batches.

    model: run in evaluation mode; its weights, gradients and modes are as before afterwards.
    data: batches ``(input, target)`` of tensors, moved to the device of the weights. A few suffice.
    loss: from output and target to a scalar, `torch.nn.functional.cross_entropy` by default.
    patterns: as in `dimap.find_modules`.

    Weights that the loss does not depend on have saliency 0. Raises ValueError for no batches,
    TypeError for a state dict.

    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, for
    single weights, with the absolute value in place of the square.
    """
    weights = _of_module(model, patterns)
    sums = {name: torch.zeros(w.shape, device=w.device) for name, w in weights.items()}
    count = 0
    for gradients in _gradients(model, weights, data, loss):
        count += 1
        for name, gradient in gradients.items():
            sums[name] += (weights[name].detach().float() * gradient).abs_()
    return {name: total.div_(count) for name, total in sums.items()}


def snip(
    model: nn.Module,
    data: Batches,
    loss: Loss | None = None,
    *,
    patterns: Patterns | Choice | None = None,
) -> dict[str, Tensor]:
    """Connection sensitivity |g| / Σ|g|, where g = ∂L/∂c = w · ∂L/∂w for a factor c = 1 on a weight.

    The batches are taken as one: their gradients are averaged before the absolute value, where
    `taylor` averages after it. On one batch the two rank alike. SNIP prunes before training; on trained
    weights gradients are small and noisy, so more data helps.

    Arguments and errors as in `taylor`. All prunable weights together sum to 1 (0 where no gradient is).

    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019.
    """
    weights = _of_module(model, patterns)
    sums = {name: torch.zeros(w.shape, device=w.device) for name, w in weights.items()}
    for gradients in _gradients(model, weights, data, loss):
        for name, gradient in gradients.items():
            sums[name] += gradient
    for name, total in sums.items():
        total.mul_(weights[name].detach()).abs_()
    whole = sum(float(total.sum(dtype=torch.float64)) for total in sums.values())
    # One float64 factor: a float32 one could underflow where the gradients are tiny.
    return {n: (t.double() / whole).float() if whole else t for n, t in sums.items()}


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], data: Batches, loss: Loss | None
) -> Iterator[dict[str, Tensor]]:
    """The gradients of each batch's loss, float32; of weights that it does not depend on, none."""
    device = next(iter(weights.values())).device
    with _evaluating(model, weights):
        some = False
        for inputs, targets in data:
            some = True
            with torch.enable_grad():
                value = (loss or F.cross_entropy)(model(_to(inputs, device)), _to(targets, device))
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"loss must give a scalar tensor, got {got}")
                found = torch.autograd.grad(value.sum(), list(weights.values()), allow_unused=True)
            pairs = zip(weights, found, strict=True)
            yield {name: g.detach().float() for name, g in pairs if g is not None}
        if not some:
            raise ValueError("data must hold at least one batch, got none")


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


def _of_module(model: object, patterns: Patterns | Choice | None) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be an nn.Module, to have gradients, got {kind}")
    return _prunable(model, patterns)


def _prunable(
    model: nn.Module | Mapping[str, Tensor], patterns: Patterns | Choice | None
) -> dict[str, Tensor]:
    modules = find_modules(model, patterns)
    tensors = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    layers = [layer for module, found in modules.items() if module != AUX for layer in found]
    if not layers:
        raise ValueError("the model must have a module to prune, got only 'aux'")
    names = wholes(p for layer in layers for p in layer.parameters)
    return {name: tensors[name] for name in names}
