"""dimap: exact, fast, data-independent pruning of transformers.

>>> modules = dimap.find_modules(model)          # {"qkv": [...], "proj": [...], "mlp": [...], "aux": [...]}
>>> scores = dimap.score(model)                  # {parameter name: float32 tensor}
>>> masks = dimap.select(model, sparsity=0.55)   # {parameter name: bool tensor}
>>> pruning = dimap.prune(model, sparsity=0.55)  # in place; pruning.masks, pruning.report()

The operators are ``torch.ops.dimap.*``, documented in `dimap.ops`. They are there as soon as torch and
dimap are both imported, in either order. dimap by itself does not import torch: its names are loaded
when they are first asked for, so that a program that works on files only need not wait for torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _C, _with_torch
from ._C import __version__, build_info
from ._installed import stranger

if TYPE_CHECKING:
    from . import methods, ops, reference, saliency
    from .bitmask import load_file, save_file
    from .budgets import Budgets
    from .finetuning import finetune
    from .groups import Layer, find_modules
    from .holding import Holding, hold_masks
    from .masks import apply_masks, load_masks, save_masks
    from .pruning import Pruning, measure_sensitivity, prune, score, select
    from .schedule import CubicSchedule, GradualPruning, Schedule
    from .semi_structured import to_semi_structured
    from .stream import prune_checkpoint

__all__ = [
    "Budgets",
    "CubicSchedule",
    "GradualPruning",
    "Holding",
    "Layer",
    "Pruning",
    "Schedule",
    "__version__",
    "apply_masks",
    "build_info",
    "find_modules",
    "finetune",
    "hold_masks",
    "load_file",
    "load_masks",
    "measure_sensitivity",
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
    "to_semi_structured",
]

# Where each name is, and the modules that are attributes of dimap.
_NAMES = {
    "bitmask": ("load_file", "save_file"),
    "budgets": ("Budgets",),
    "finetuning": ("finetune",),
    "groups": ("Layer", "find_modules"),
    "holding": ("Holding", "hold_masks"),
    "masks": ("apply_masks", "load_masks", "save_masks"),
    "pruning": ("Pruning", "measure_sensitivity", "prune", "score", "select"),
    "schedule": ("CubicSchedule", "GradualPruning", "Schedule"),
    "semi_structured": ("to_semi_structured",),
    "stream": ("prune_checkpoint",),
}
_MODULES = {
    *_NAMES,
    "checkpoint",
    "families",
    "flops",
    "integrations",
    "methods",
    "ops",
    "plots",
    "report",
}
_MODULES |= {"reference", "saliency"}


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for."""
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    for module, names in _NAMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


if _told := stranger(Path(_C.__file__).parent):
    warnings.warn(_told, RuntimeWarning, stacklevel=2)
_with_torch.register_operators()
