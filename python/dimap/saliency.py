"""What weights are ranked by: a non-negative number for each, high where it is to be kept.

Every function here returns parameter name -> float32 tensor of the parameter's shape and device, for
the prunable parameters; `dimap.select` and `dimap.prune` take it as `saliency`, or any other such
mapping. Zero weights have saliency 0 in all but `random`.

>>> dimap.prune(model, 0.5, scope="global", saliency=dimap.saliency.taylor(model, batches))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import Choice, Model, Patterns, named_tensors, shapes_of, tied_in, wholes
from .groups.identity import same_weights
from .groups.plan import Plan

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Batches: TypeAlias = Iterable[tuple[Any, Any]]

__all__ = [
    "Batches",
    "Loss",
    "by_norms",
    "input_norms",
    "magnitude",
    "random",
    "snip",
    "taylor",
    "wanda",
]


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
    data: batches ``(input, target)`` of tensors, moved to the device of the weights. A few suffice. An
        input may be a mapping: the model's arguments by name.
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


def wanda(
    model: nn.Module,
    data: Batches,
    loss: Loss | None = None,
    *,
    patterns: Patterns | Choice | None = None,
) -> dict[str, Tensor]:
    """``|w| · ‖x‖``, where x are the inputs that a weight is multiplied with: see `input_norms`.

    For `scope="row"`, where the weights of one output compete. Arguments as in `taylor`; targets and
    `loss` say nothing.

    Source: Sun et al., "A simple and effective pruning approach for large language models", ICLR
    2024, Eq. 1.
    """
    return by_norms(model, input_norms(model, data, patterns=patterns), patterns=patterns)


def by_norms(
    model: Model, norms: Mapping[str, Tensor], *, patterns: Patterns | Choice | None = None
) -> dict[str, Tensor]:
    """`wanda` by norms at hand, of `input_norms` or a file of them: ``|w| · ‖x‖`` in float32.

    A product is exact before it is rounded, once: with the same norms the saliencies, and the masks,
    are the same bits on every device.

    norms: their names may be of another spelling of the model, as of masks in `dimap.apply_masks`.

    Raises ValueError for norms that are missing, not float32, or of a shape that does not fit.
    """
    weights = _prunable(model, patterns)
    fitted = fit_norms(norms, shapes_of(model), list(weights))
    return {name: scaled(w, fitted[name]) for name, w in weights.items()}


def scaled(weights: Tensor, norms: Tensor) -> Tensor:
    """|w| · ‖x‖, float32."""
    return weights.detach().float().abs() * norms.to(weights.device)


def fit_norms(
    norms: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> dict[str, Tensor]:
    """The norms of the weights of these names, checked. What is fused or split has the same inputs.

    shapes: of all parameters of the model.
    """
    given = {name: tuple(norm.shape) for name, norm in norms.items()}
    fitted: dict[str, Tensor] = {}
    for those, theirs in same_weights(given, shapes):
        fitted |= dict.fromkeys(theirs, norms[those[0]])
    for name in names:
        if name not in fitted:
            raise ValueError(f"norms must have every prunable weight, got none of {name}")
        norm, shape = fitted[name], shapes[name]
        pairs = itertools.zip_longest(norm.shape, shape)
        if any(size not in (1, whole) for size, whole in pairs):
            wanted = f"{shape}, or 1 in place of a size"
            raise ValueError(f"norms of {name} must have shape {wanted}, got {tuple(norm.shape)}")
        if norm.dtype != torch.float32 or not bool((norm.isfinite() & (norm >= 0)).all()):
            got = "other numbers" if norm.dtype == torch.float32 else str(norm.dtype)
            raise ValueError(f"norms of {name} must be float32, finite, not negative, got {got}")
    return {name: fitted[name] for name in names}


def input_norms(
    model: nn.Module, data: Batches, *, patterns: Patterns | Choice | None = None
) -> dict[str, Tensor]:
    """The Euclidean norm of each input of the prunable layers, over all tokens of all batches.

    Returns parameter name -> float32 of the weight's dimensions, with 1 in place of those that are no
    input: [1, in] for a Linear's [out, in]. `safetensors.torch.save_file` writes it for
    `dimap prune --method wanda --input-norms`.

    model, data, patterns: as in `taylor`; targets say nothing. Every token counts: of text, give
        batches without padding. Sums are of float64, in an order that may differ between devices.

    Raises ValueError for no batches, for a weight that is no Linear's, Conv1D's or 1x1 convolution's,
    and for one that no input reaches; TypeError for a state dict.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, to be run, got {type(model).__name__}")
    weights = _prunable(model, patterns)
    names = {id(w): name for name, w in weights.items()}
    sums: dict[str, Tensor] = {}

    def counting(name: str, axis: int, ndim: int) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            x = next(iter((*inputs, *named.values()))).detach()
            x = x.movedim(-3, -1) if isinstance(module, nn.Conv2d) else x
            total = x.float().flatten(0, -2).square().sum(0, dtype=torch.float64)
            total = total.view([-1 if d == axis else 1 for d in range(ndim)])
            sums[name] = sums[name] + total if name in sums else total

        return count

    handles, seen = [], set()
    for module in model.modules():
        name, axis = names.get(id(getattr(module, "weight", None))), _input_axis(module)
        if name is not None and axis is not None:
            hook = counting(name, axis, weights[name].ndim)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            seen.add(name)
    batches = 0
    try:
        if odd := [name for name in weights if name not in seen]:
            raise ValueError(
                f"{odd[0]} must be the weight of a Linear, a Conv1D or a 1x1 convolution for its "
                "inputs to be seen: ignore it, or give a saliency of your own"
            )
        with _evaluating(model, {}), torch.no_grad():
            device = next(iter(weights.values())).device
            for inputs, _ in data:
                batches += 1
                _run(model, inputs, device)
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("data must hold at least one batch, got none")
    if missing := [name for name in weights if name not in sums]:
        raise ValueError(
            f"{missing[0]} must be reached by the inputs, got none: give more data, or ignore it"
        )
    return {name: sums[name].sqrt().float() for name in weights}


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
                value = (loss or F.cross_entropy)(_run(model, inputs, device), _to(targets, device))
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


def _input_axis(module: nn.Module) -> int | None:
    """The input axis of a module's weight; None where its inputs are not simply multiplied with it."""
    if isinstance(module, nn.Linear):
        return 1
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and not module.padding_mode.startswith("r")
        return 1 if plain and set(module.kernel_size) == {1} and not any(module.padding) else None
    return 0 if type(module).__name__ == "Conv1D" else None  # of transformers


def _run(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """The model's output; a mapping holds arguments by name, as language models take them."""
    if isinstance(inputs, Mapping):
        return model(**{name: _to(value, device) for name, value in inputs.items()})
    return model(_to(inputs, device))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _prunable(model: Model, patterns: Patterns | Choice | None) -> dict[str, Tensor]:
    ties = tied_in(model)
    names = Plan.of_shapes(shapes_of(model), "layer", "layer", patterns, ties).names
    tensors = named_tensors(model)
    return {name: tensors[name] for name in wholes(names)}
