"""Pictures of a pruning. They need matplotlib: ``pip install 'dimap[plot]'``.

Every function returns a matplotlib Figure, and writes it where `path` is given, PNG or SVG by its
ending. Nothing global is changed, and matplotlib is imported only when a picture is drawn.

>>> plots.kept_ratios(pruning.report(), "kept.png")
>>> plots.accuracy_curves(rows, "accuracy.svg")
"""

from __future__ import annotations

from ._curves import accuracy_curves, load_rows
from ._kept import kept_ratios

__all__ = ["accuracy_curves", "kept_ratios", "load_rows"]
