"""Sparse checkpoints in fewer bytes: one bit a weight, and the nonzero values.

A bitmask file is a safetensors file that stands for a dense one and gives it back bit by bit. It is
written by `save_file`, `dimap.prune_checkpoint(..., format="bitmask")` and `dimap prune --format bitmask`;
with "compact" in compressed blocks. `load_file`, `expand` and `dimap expand` read both. The format is
described in docs/format.md.
"""

from __future__ import annotations

from .checkpoint.bitmask import save_file
from .checkpoint.expand import expand, load_file

__all__ = ["expand", "load_file", "save_file"]
