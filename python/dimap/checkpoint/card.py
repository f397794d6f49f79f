"""What is said of a pruning in a model card: the README.md of a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..report import Report

HEADING = "## Pruned with dimap"


def add_card_section(folder: Path, report: Report, source: str) -> None:
    """Put a section into the card of a folder, in the place of an earlier one; make the card if need be."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.unlink(missing_ok=True)  # it may be read-only like the original
    before = text.partition(HEADING)[0].rstrip()
    rows = [(m.name, m.weights, m.kept, m.nonzero) for m in report.modules]
    rows.append(("all", report.weights, report.kept, report.nonzero))
    table = [
        f"| {name} | {weights:,} | {kept:,} | {nonzero:,} |"
        for name, weights, kept, nonzero in rows
    ]
    asked = ", ".join(f"{name} {share:g}" for name, share in report.sparsity.items())
    lines = [
        HEADING,
        f"The weights of `{source.partition(':')[2]}`, pruned in one shot and without data "
        f"(scope {report.scope}, normalized by {report.normalize}; shares removed: {asked}).",
        "| module | weights | kept | nonzero |\n|---|---|---|---|\n" + "\n".join(table),
    ]
    path.write_text("\n\n".join(filter(None, [before, *lines])) + "\n", encoding="utf-8")
