"""Pictures of a pruning. They need matplotlib: ``pip install 'torch-dimap[plot]'``.

Every function returns a matplotlib Figure, and writes it where `path` is given, PNG or SVG by its
ending. Nothing global is changed, and matplotlib is imported only when a picture is drawn.

>>> plots.kept_ratios(pruning.report(), "kept.png")
>>> plots.weight_histograms(model, "weights.png", masks=masks)
>>> plots.mask_picture(pruning, "layers.2.blocks.5.attn.qkv", "mask.png")
>>> plots.write_report(pruning, "report/")
>>> plots.sensitivity_curves(dimap.measure_sensitivity(model), "sensitivity.png")
>>> plots.accuracy_curves(rows, "accuracy.svg")
>>> plots.bench_times(dimap.bench.bench(quick=True), "times.png")
"""

from __future__ import annotations

from .curves import accuracy_curves, load_rows
from .histograms import weight_histograms
from .kept import kept_ratios
from .mask import mask_picture
from .report_folder import report_output, write_report
from .sensitivity import sensitivity_curves
from .style import check_path
from .timings import bench_times

__all__ = [
    "accuracy_curves",
    "bench_times",
    "check_path",
    "kept_ratios",
    "load_rows",
    "mask_picture",
    "report_output",
    "sensitivity_curves",
    "weight_histograms",
    "write_report",
]
