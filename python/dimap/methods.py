"""Ready-made methods by name, and what the arguments of one call make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .distributed import check_whole
from .groups import Model, Patterns
from .groups.plan import Normalize, Plan, Scope, check_choice, parameters_of

if TYPE_CHECKING:
    from torch import Tensor

    from .saliency import Batches, Loss

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """What weights are ranked by, and where.

    saliency: from (model, data, loss, patterns) to the saliency; None: the weights' magnitudes.
    source: who proposed it.
    """

    scope: Scope
    normalize: Normalize
    source: str
    saliency: Callable[..., dict[str, Tensor]] | None = None

    @property
    def needs_data(self) -> bool:
        """Whether batches of data are needed, beside the weights."""
        return self.saliency is not None


def _taylor(*arguments: Any, **options: Any) -> dict[str, Tensor]:
    from .saliency import taylor  # here, since it imports torch

    return taylor(*arguments, **options)


def _snip(*arguments: Any, **options: Any) -> dict[str, Tensor]:
    from .saliency import snip

    return snip(*arguments, **options)


METHODS: Mapping[str, Method] = {
    "dimap": Method("module", "layer", "He and Zhou, ICLR 2024"),
    "lamp": Method("global", "layer", "Lee et al., ICLR 2021"),
    "uniform": Method("layer", "layer", "magnitude, the same ratio in every layer"),
    "global_magnitude": Method("global", "scope", "magnitude, one threshold for the network"),
    "taylor": Method("global", "scope", "Molchanov et al., CVPR 2019", _taylor),
    "snip": Method("global", "scope", "Lee et al., ICLR 2019", _snip),
}


@dataclass(frozen=True)
class Ranking:
    """The tensors to rank, numbered for the operators."""

    plan: Plan
    tensors: list[Tensor]
    keep: list[int]
    scope: Scope
    normalize: Normalize
    saliency: str  # "magnitude", "given", or the method's name
    labels: Sequence[str]  # of the tensors, for errors


def rank(
    model: Model,
    sparsity: float | Mapping[str, float],
    *,
    method: str,
    scope: Scope | None,
    normalize: Normalize | None,
    saliency: Mapping[str, Tensor] | None,
    data: Batches | None,
    loss: Loss | None,
    patterns: Patterns | None,
) -> Ranking:
    """What a call of `dimap.select` is to rank; everything is checked before data are read."""
    from torch import nn

    check_choice("method", method, tuple(METHODS))
    chosen = METHODS[method]
    if saliency is not None and chosen.needs_data:
        raise ValueError(f"saliency must be left to method={method!r}, got both")
    if chosen.needs_data and data is None:
        raise ValueError(f"method={method!r} needs data, batches (input, target), got none")
    if chosen.needs_data and not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"method={method!r} needs an nn.Module, to have gradients, got {kind}")
    scope = scope or chosen.scope
    # A saliency of the caller's own is an order already: it is normalised only on request.
    normalize = normalize or ("scope" if saliency is not None else chosen.normalize)
    plan = Plan.of(model, scope, normalize, patterns)
    if saliency is not None or data is not None:  # only magnitudes are ranked on several processes
        check_whole(parameters_of(model).values(), "data" if saliency is None else "saliency")
    keep = plan.keep(sparsity)
    source = "magnitude" if saliency is None else "given"
    if chosen.saliency is not None:
        saliency = chosen.saliency(model, data, loss, patterns=patterns)
        source = method
    if saliency is None:
        return Ranking(plan, plan.tensors, keep, scope, normalize, source, plan.names)
    labels = [f"saliency of {name}" for name in plan.names]
    return Ranking(plan, plan.ranked(saliency), keep, scope, normalize, source, labels)
