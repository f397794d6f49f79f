"""Prune a safetensors file, or a folder of them, without loading it: see `dimap.checkpoint.prune`."""

from __future__ import annotations

from .checkpoint.prune import Progress, StreamPruning, prune_checkpoint, pruning_checkpoint

__all__ = ["Progress", "StreamPruning", "prune_checkpoint", "pruning_checkpoint"]
