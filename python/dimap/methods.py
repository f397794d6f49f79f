"""Ready-made methods by name. torch is imported when a saliency is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .groups.plan import Normalize, Scope

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """What weights are ranked by, and where.

    source: who proposed it.
    function: which of `dimap.saliency` is ranked; None: the weights' magnitudes.
    needs_norms: whether a checkpoint is ranked with the norms of the inputs, in place of data.
    """

    scope: Scope
    normalize: Normalize
    source: str
    function: str | None = None
    needs_norms: bool = False

    @property
    def streams(self) -> bool:
        """Whether a checkpoint can be pruned so, from file to file."""
        return not self.needs_data or self.needs_norms

    @property
    def needs_data(self) -> bool:
        """Whether batches of data are needed, beside the weights."""
        return self.function is not None

    @property
    def saliency(self) -> Callable[..., dict[str, Tensor]] | None:
        """From (model, data, loss, patterns) to the saliency; None: the weights' magnitudes."""
        saliencies: Any = import_module(".saliency", __package__) if self.function else None
        return getattr(saliencies, self.function or "", None)


METHODS: Mapping[str, Method] = {
    "dimap": Method("module", "layer", "He and Zhou, ICLR 2024"),
    "lamp": Method("global", "layer", "Lee et al., ICLR 2021"),
    "uniform": Method("layer", "layer", "magnitude, the same ratio in every layer"),
    "global_magnitude": Method("global", "scope", "magnitude, one threshold for the network"),
    "taylor": Method("global", "scope", "Molchanov et al., CVPR 2019", "taylor"),
    "snip": Method("global", "scope", "Lee et al., ICLR 2019", "snip"),
    "wanda": Method("row", "layer", "Sun et al., ICLR 2024", "wanda", needs_norms=True),
}
