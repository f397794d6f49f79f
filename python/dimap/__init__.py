"""dimap: exact, fast, data-independent pruning of transformers.

>>> modules = dimap.find_modules(model)          # {"qkv": [...], "proj": [...], "mlp": [...], "aux": [...]}
>>> scores = dimap.score(model)                  # {parameter name: float32 tensor}
>>> masks = dimap.select(model, sparsity=0.55)   # {parameter name: bool tensor}
>>> pruning = dimap.prune(model, sparsity=0.55)  # in place; pruning.masks, pruning.report()

The operators are ``torch.ops.dimap.*``, documented in `dimap.ops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import methods, ops, reference, saliency
from ._C import __version__, build_info
from .groups import Layer, find_modules
from .pruning import Pruning, prune, score, select

if TYPE_CHECKING:
    from .bitmask import load_file, save_file
    from .finetuning import finetune
    from .holding import Holding, hold_masks
    from .masks import apply_masks, load_masks, save_masks
    from .schedule import CubicSchedule, GradualPruning
    from .stream import prune_checkpoint

__all__ = [
    "CubicSchedule",
    "GradualPruning",
    "Holding",
    "Layer",
    "Pruning",
    "__version__",
    "apply_masks",
    "build_info",
    "find_modules",
    "finetune",
    "hold_masks",
    "load_file",
    "load_masks",
    "methods",
    "ops",
    "prune",
    "prune_checkpoint",
    "reference",
    "saliency",
    "save_file",
    "save_masks",
    "score",
    "select",
]

_LAZY = {
    "CubicSchedule": "schedule",
    "GradualPruning": "schedule",
    "Holding": "holding",
    "apply_masks": "masks",
    "finetune": "finetuning",
    "hold_masks": "holding",
    "load_file": "bitmask",
    "load_masks": "masks",
    "prune_checkpoint": "stream",
    "save_file": "bitmask",
    "save_masks": "masks",
}


def __getattr__(name: str) -> Any:
    """Load what needs more than torch only when it is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
