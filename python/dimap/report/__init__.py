"""What a pruning did, in numbers: `Report`, its JSON and its tables; `Pruned`, which is counted."""

from __future__ import annotations

from .pruned import Pruned, build_report
from .report import VERSION, LayerReport, ModuleReport, Report

__all__ = ["VERSION", "LayerReport", "ModuleReport", "Pruned", "Report", "build_report"]
