"""Tables and plots of the protocol's results.

    python experiments/paper/report.py experiments/paper/results/quick.json

Writes the tables into docs/results.md, each between its markers, and the plots into docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A results file, with look-ups."""

    settings: dict[str, Any]
    head: dict[str, Any]
    cells: Cells

    @staticmethod
    def read(path: Path) -> Run:
        made = json.loads(path.read_text())
        if made.get("schema") != "dimap.paper" or made.get("version") != 1:
            raise ValueError(f"{path} must be a results file of run.py, version 1")
        head = {name: value for name, value in made.items() if name not in ("settings", "cells")}
        return Run(made["settings"], head, made["cells"])

    def values(
        self, method: str, ratio: float, measure: str, scope: str | None = None
    ) -> dict[int, float]:
        """Seed -> percent."""
        return {
            c["seed"]: c[measure]
            for c in self.cells
            if c["kind"] == "prune"
            and (c["method"], c["ratio"], c.get("scope")) == (method, ratio, scope)
            and measure in c
        }

    def feature(self, method: str, ratio: float, measure: str = "one_shot") -> float | None:
        for c in self.cells:
            if c["kind"] == "features" and (c["method"], c["ratio"]) == (method, ratio):
                return float(c[measure])
        return None

    @property
    def ratios(self) -> list[float]:
        return list(self.settings["ratios"])


def mean_and_spread(values: Mapping[int, float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values.values())
    return (
        f"{mean:.1f} ± {statistics.stdev(values.values()):.1f}"
        if len(values) > 1
        else f"{mean:.1f}"
    )


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, bool]:
    """Mean of ours less theirs over seeds, its standard error, and whether one is ahead.

    One is ahead where every seed says so and the mean is beyond two standard errors.
    """
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean = statistics.mean(gaps)
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    agree = all(g > 0 for g in gaps) or all(g < 0 for g in gaps)
    return mean, error, agree and abs(mean) > 2 * error


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percents(ratios: Sequence[float]) -> list[str]:
    return [f"{100 * r:g} %" for r in ratios]


def accuracy_table(run: Run, measure: str) -> str:
    """Methods by ratios, mean ± standard deviation over the seeds, the highest mean in bold."""
    methods = run.settings["methods"]
    found = {m: [run.values(m, r, measure) for r in run.ratios] for m in methods}
    best = [
        max(statistics.mean(found[m][i].values()) for m in methods) for i in range(len(run.ratios))
    ]
    rows = [
        [f"`{m}`"]
        + [
            f"**{mean_and_spread(v)}**"
            if statistics.mean(v.values()) == top
            else mean_and_spread(v)
            for v, top in zip(found[m], best, strict=True)
        ]
        for m in methods
    ]
    return table(["weights removed", *percents(run.ratios)], rows)


def gap_table(run: Run, measure: str) -> str:
    """DIMAP less every other method, mean ± standard error; bold where one is ahead."""
    rows = []
    for method in (m for m in run.settings["methods"] if m != "dimap"):
        row = [f"less `{method}`"]
        for ratio in run.ratios:
            gap = paired(run.values("dimap", ratio, measure), run.values(method, ratio, measure))
            row.append(_gap(gap))
        rows.append(row)
    return table(["DIMAP", *percents(run.ratios)], rows)


def _gap(gap: tuple[float, float, bool]) -> str:
    text = f"{gap[0]:+.1f} ± {gap[1]:.1f}"
    return f"**{text}**" if gap[2] else text


def single_table(run: Run) -> str:
    """Multiple against single module: the paper's Table 4."""
    rows = []
    for measure, name in (("one_shot", "one shot"), ("tuned", "fine-tuned")):
        for method, kind in (("dimap", "three modules"), ("lamp", "single module")):
            cells = [mean_and_spread(run.values(method, r, measure)) for r in run.ratios]
            rows.append([f"{name}, {kind}", *cells])
        gaps = [
            paired(run.values("dimap", r, measure), run.values("lamp", r, measure))
            for r in run.ratios
        ]
        rows.append([f"{name}, difference", *map(_gap, gaps)])
    return table(["weights removed", *percents(run.ratios)], rows)


SCOPES: dict[str, tuple[str, str | None]] = {
    "module (qkv, proj, mlp): DIMAP": ("dimap", None),
    "type (FC1 and FC2 apart)": ("dimap", "type"),
    "block": ("dimap", "block"),
    "stage": ("dimap", "stage"),
    "network: LAMP": ("lamp", None),
    "layer: uniform magnitude": ("uniform", None),
}


def scope_table(run: Run, measure: str) -> str:
    ratios = run.ratios if measure == "one_shot" else list(run.settings["scope_tunes"])
    rows = [
        [name, *(mean_and_spread(run.values(method, r, measure, scope)) for r in ratios)]
        for name, (method, scope) in SCOPES.items()
    ]
    return table(["one threshold for each", *percents(ratios)], rows)


def feature_table(run: Run) -> str:
    methods = list(
        dict.fromkeys(
            c["method"] for c in run.cells if c["kind"] == "features" and c["method"] != "dense"
        )
    )
    found = {m: [run.feature(m, r) or 0.0 for r in run.ratios] for m in methods}
    best = [max(found[m][i] for m in methods) for i in range(len(run.ratios))]
    rows = [
        [f"`{m}`"]
        + [
            f"**{v:.1f}**" if v == top else f"{v:.1f}"
            for v, top in zip(found[m], best, strict=True)
        ]
        for m in methods
    ]
    return table(["weights removed", *percents(run.ratios)], rows)


def dense_lines(run: Run) -> str:
    trained = [c for c in run.cells if c["kind"] == "train"]
    accuracy = mean_and_spread({c["seed"]: c["accuracy"] for c in trained})
    tuned = mean_and_spread(run.values("dense", 0.0, "tuned"))
    made = trained[0]
    return (
        f"Dense: {accuracy} %; after as much fine-tuning as the pruned models get: {tuned} %. "
        f"{made['parameters']:,} parameters, {made['prunable']:,} of them prunable; "
        f"{made['steps']:,} steps of training, {run.settings['tune_steps']} of fine-tuning, "
        f"batch {run.settings['batch']}.\n\n"
        f"{run.head['machine']}, torch {run.head['torch']}: "
        f"{run.head['cpu_minutes']} minutes of CPU time in {len(run.cells)} cells."
    )


def dense_features(run: Run) -> str:
    dense, pixels = run.feature("dense", 0.0), run.feature("dense", 0.0, "pixels")
    return f"Dense features: {dense:.1f} %; the pixels themselves: {pixels:.1f} %; chance: 10 %."


TABLES: dict[str, Callable[[Run], str]] = {
    "dense": dense_lines,
    "one-shot": lambda run: accuracy_table(run, "one_shot"),
    "one-shot-gaps": lambda run: gap_table(run, "one_shot"),
    "tuned": lambda run: accuracy_table(run, "tuned"),
    "tuned-gaps": lambda run: gap_table(run, "tuned"),
    "single": single_table,
    "scopes": lambda run: scope_table(run, "one_shot"),
    "scopes-tuned": lambda run: scope_table(run, "tuned"),
    "features-dense": dense_features,
    "features": feature_table,
}


def fill(text: str, run: Run) -> str:
    """The text with each table between its markers made anew."""
    for name, make in TABLES.items():
        if name.startswith("features") and run.feature("dense", 0.0) is None:
            continue
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, make=make: f"{m[1]}{make(run)}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"the page must have the markers {name!r} once, got {count}")
    return text


def main() -> None:
    from plots import draw

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    run = Run.read(args.results)
    args.page.write_text(fill(args.page.read_text(), run))
    print(f"wrote {args.page}", *draw(run, args.images), sep=", ")


if __name__ == "__main__":
    main()
