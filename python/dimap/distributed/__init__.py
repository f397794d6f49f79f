"""Several processes: torch's groups, torchrun, sharded tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def is_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of them is a DTensor: it lies on several processes."""
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: then there is none
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def check_whole(tensors: Iterable[object], what: str) -> None:
    """Refuse a DTensor: its operators would tell of the local part as if it were the whole."""
    if is_sharded(tensors):
        raise ValueError(f"{what} needs whole tensors, got a sharded model's (DTensor)")
