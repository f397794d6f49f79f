"""Tables and plots of the protocol's results.

    python experiments/paper/report.py experiments/paper/results/*.json

Writes the tables into docs/results.md, each between its markers, and the plots into docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Cells = list[dict[str, Any]]
CROPS = 4  # of a photograph
IMAGES = 60000  # for training


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
        """What errors are of, and its value: a seed's percent; of one trained model each hundred test
        images' percent; of features each photograph's cosine, the mean of its crops'.
        """
        asked = method, ratio, scope
        cells = [c for c in self.cells if c["kind"] in ("prune", "features")]
        found: dict[int, float] = {}
        for c in cells:
            if (c["method"], c["ratio"], c.get("scope")) != asked or measure not in c:
                continue
            if c["kind"] == "features":
                crops = c[measure]
                found |= {
                    i: statistics.mean(crops[CROPS * i : CROPS * (i + 1)])
                    for i in range(len(crops) // CROPS)
                }
            elif f"{measure}_hundreds" in c:
                found |= enumerate(map(float, c[f"{measure}_hundreds"]))
            else:
                found[c["seed"]] = c[measure]
        return found

    def shown(self, values: Mapping[int, float]) -> str:
        """The mean, ± the standard deviation over seeds, or the standard error over images."""
        if not values:
            return ""
        mean, spread = f"{statistics.mean(values.values()):.{self.digits}f}", ""
        if len(values) > 1:
            spread = f" ± {(_spread if self.seeds else _error)(values.values()):.{self.digits}f}"
        return mean + spread

    def gap(self, ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
        """The paired difference ± its standard error, in bold where one is ahead."""
        if not (ours and theirs):
            return ""
        mean, error, ahead = paired(ours, theirs)
        text = f"{mean:+.{self.digits}f} ± {error:.{self.digits}f}"
        return f"**{text}**" if ahead else text

    @property
    def name(self) -> str:
        return str(self.settings["name"])

    @property
    def seeds(self) -> bool:
        """Whether errors are over seeds."""
        return len(self.settings.get("seeds", [])) > 1

    @property
    def digits(self) -> int:
        return 3 if self.name == "features" else 1

    def ratios(self, measure: str) -> list[float]:
        tunes = self.settings.get("tunes") if measure == "tuned" else None
        return list(tunes or self.settings["ratios"])


def _spread(values: Iterable[float]) -> float:
    return statistics.stdev(values)


def _error(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, bool]:
    """Mean of ours less theirs over seeds or images, its standard error, and whether one is ahead.

    One is ahead of up to three seeds where every seed says so and the mean is beyond two standard
    errors; of images where the mean is beyond three.
    """
    gaps = [ours[each] - theirs[each] for each in ours if each in theirs]
    mean, error = statistics.mean(gaps), _error(gaps)
    if len(gaps) > 3:
        return mean, error, abs(mean) > 3 * error
    agree = all(g > 0 for g in gaps) or all(g < 0 for g in gaps)
    return mean, error, agree and abs(mean) > 2 * error


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percents(ratios: Sequence[float]) -> list[str]:
    return [f"{100 * r:g} %" for r in ratios]


Row = tuple[str, str, str | None]  # its name, method and scope


def methods(run: Run) -> list[Row]:
    return [(f"`{method}`", method, None) for method in run.settings["methods"]]


def value_table(run: Run, measure: str, rows: Sequence[Row]) -> str:
    """Rows by ratios; the highest mean in bold."""
    ratios = run.ratios(measure)
    found = [[run.values(m, r, measure, scope) for r in ratios] for _, m, scope in rows]
    best = [
        max(statistics.mean(v.values()) for v in column if v) for column in zip(*found, strict=True)
    ]
    cells = [
        [name]
        + [
            f"**{run.shown(v)}**" if v and statistics.mean(v.values()) == top else run.shown(v)
            for v, top in zip(values, best, strict=True)
        ]
        for (name, *_), values in zip(rows, found, strict=True)
    ]
    return table(["weights removed", *percents(ratios)], cells)


def gap_table(run: Run, measure: str, rows: Sequence[Row]) -> str:
    """DIMAP less every other row; bold where one is ahead."""
    ratios = run.ratios(measure)
    cells = [
        [f"less {name}"]
        + [
            run.gap(run.values("dimap", r, measure), run.values(method, r, measure, scope))
            for r in ratios
        ]
        for name, method, scope in rows
        if (method, scope) != ("dimap", None)
    ]
    return table(["DIMAP", *percents(ratios)], cells)


def single_table(run: Run) -> str:
    """Multiple against single module: the paper's Table 4."""
    rows = []
    ratios = run.ratios("one_shot")
    for measure, name in (("one_shot", "one shot"), ("tuned", "fine-tuned")):
        pair = [[run.values(m, r, measure) for r in ratios] for m in ("dimap", "lamp")]
        rows += [
            [f"{name}, {kind}", *map(run.shown, values)]
            for kind, values in zip(("three modules", "single module"), pair, strict=True)
        ]
        rows.append([f"{name}, difference", *map(run.gap, *pair)])
    return table(["weights removed", *percents(ratios)], rows)


SCOPES: dict[str, tuple[str, str | None]] = {
    "module (qkv, proj, mlp): DIMAP": ("dimap", None),
    "type (FC1 and FC2 apart)": ("dimap", "type"),
    "block": ("dimap", "block"),
    "stage": ("dimap", "stage"),
    "network: LAMP": ("lamp", None),
    "layer: uniform magnitude": ("uniform", None),
}


FEATURE_SCOPES: dict[tuple[str, str], str] = {
    ("dimap", "type"): "Eq. 10, a threshold for each type",
    ("dimap", "block"): "Eq. 10, for each block",
    ("global_magnitude", "module"): "magnitude, for each module",
}


def scope_table(run: Run, measure: str) -> str:
    ratios = run.ratios("one_shot") if measure == "one_shot" else run.settings["scope_tunes"]
    rows = [
        [name, *(run.shown(run.values(method, r, measure, scope)) for r in ratios)]
        for name, (method, scope) in SCOPES.items()
    ]
    return table(["one threshold for each", *percents(ratios)], rows)


def feature_rows(run: Run) -> list[Row]:
    asked = [tuple(pair) for pair in run.settings["scopes"]]
    return [*methods(run), *((FEATURE_SCOPES[pair], *pair) for pair in asked)]


def recovery_table(run: Run, gaps: bool) -> str:
    """Before and after the recovery; or DIMAP less the others after it."""
    head, columns = [], []
    for ratio in run.settings["tune_ratios"]:
        for token in ("patch", "class"):
            for measure, when in ((token, "one shot"), (f"{token}_tuned", "recovered")):
                if gaps and when == "one shot":
                    continue
                head.append(f"{100 * ratio:g} %, {token}" + ("" if gaps else f", {when}"))
                columns.append((ratio, measure))
    rows = []
    for method in run.settings["tune_methods"]:
        found = [run.values(method, *column) for column in columns]
        if not gaps:
            rows.append([f"`{method}`", *map(run.shown, found)])
        elif method != "dimap":
            ours = [run.values("dimap", *column) for column in columns]
            rows.append([f"less `{method}`", *map(run.gap, ours, found)])
    return table(["DIMAP" if gaps else "weights removed", *head], rows)


def dense_lines(run: Run) -> str:
    trained = [c for c in run.cells if c["kind"] == "train"]
    accuracy = run.shown({c["seed"]: c["accuracy"] for c in trained})
    tuned = run.shown(run.values("dense", 0.0, "tuned"))
    made = trained[0]
    planned = round(made["epochs"] * IMAGES / run.settings["batch"])
    early = f" (of {planned:,} planned; the clock came first)" if made["steps"] < planned else ""
    return (
        f"Dense: {accuracy} %; after as much fine-tuning as the pruned models get: {tuned} %. "
        f"{made['parameters']:,} parameters, {made['prunable']:,} of them prunable; "
        f"{made['steps']:,} steps of training{early}, {run.settings['tune_steps']} of fine-tuning, "
        f"batch {run.settings['batch']}.\n\n"
        f"{_machine(run)}"
    )


def _machine(run: Run) -> str:
    return (
        f"{run.head['machine']}, torch {run.head['torch']}: "
        f"{run.head['cpu_minutes']} minutes of CPU time in {len(run.cells)} cells."
    )


def dense_features(run: Run) -> str:
    (dense,) = (c for c in run.cells if c["method"] == "dense")
    return (
        f"The model in timm's names and the package's own graph differ by {dense['difference']:.1e} at "
        f"most in a token.\n\n{_machine(run)}"
    )


Make = Callable[[Run], str]
SWIN: dict[str, Make] = {
    "dense": dense_lines,
    "one-shot": lambda run: value_table(run, "one_shot", methods(run)),
    "one-shot-gaps": lambda run: gap_table(run, "one_shot", methods(run)),
    "tuned": lambda run: value_table(run, "tuned", methods(run)),
    "tuned-gaps": lambda run: gap_table(run, "tuned", methods(run)),
    "scopes": lambda run: scope_table(run, "one_shot"),
    "single": single_table,
    "scopes-tuned": lambda run: scope_table(run, "tuned"),
}
FEATURES: dict[str, Make] = {
    "features-dense": dense_features,
    "features-patch": lambda run: value_table(run, "patch", feature_rows(run)),
    "features-patch-gaps": lambda run: gap_table(run, "patch", feature_rows(run)),
    "features-class": lambda run: value_table(run, "class", feature_rows(run)),
    "features-class-gaps": lambda run: gap_table(run, "class", feature_rows(run)),
    "features-recovery": lambda run: recovery_table(run, gaps=False),
    "features-recovery-gaps": lambda run: recovery_table(run, gaps=True),
}
IN_LARGE = ("dense", "one-shot", "one-shot-gaps", "tuned", "tuned-gaps")
LARGE = {f"large-{name}": SWIN[name] for name in IN_LARGE}
TABLES = {"large": LARGE, "features": FEATURES}  # of a run's name; of all others: SWIN


def fill(text: str, run: Run) -> str:
    """The text with each table between its markers made anew."""
    for name, make in TABLES.get(run.name, SWIN).items():
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
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    for path in args.results:
        run = Run.read(path)
        args.page.write_text(fill(args.page.read_text(), run))
        print(f"wrote {args.page} from {path}", *draw(run, args.images), sep=", ")


if __name__ == "__main__":
    main()
