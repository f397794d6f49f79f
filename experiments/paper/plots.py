"""The plots of the protocol's results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dimap.plots import accuracy_curves, style
from dimap.plots.curves import METHODS

if TYPE_CHECKING:
    from report import Run

MEASURES = {"one_shot": "one shot", "tuned": "fine-tuned"}
NAMES = {
    "lamp": "network (LAMP)",
    "uniform": "layer (uniform)",
    "global_magnitude": "magnitude, network",
}
# Of a method with another scope: name, colour, marker and dashes.
SCOPED: dict[tuple[str, str], tuple[str, str, str, Any]] = {
    ("dimap", "type"): ("type", style.GREY, "x", (0, (2.5, 1.5))),
    ("dimap", "block"): ("block", style.SKY, "P", (0, (1, 1))),
    ("dimap", "stage"): ("stage", style.GREY, "d", (0, (6, 1, 1, 1, 1, 1))),
    ("global_magnitude", "module"): ("magnitude, module", style.GREY, "h", "-"),
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Write every plot that the results allow; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    if run.name == "features":
        made = [folder / "paper-features.png"]
        features(run, made[0])
        return made
    if run.name == "large":
        made = [folder / "paper-large.png"]
        rows = [row for row in accuracy_rows(run) if row["panel"] == "one shot"]
        accuracy_curves(rows, made[0], title="A larger Swin on Fashion-MNIST, one shot")
        return made
    made = [folder / "paper-accuracy.png", folder / "paper-scopes.png"]
    accuracy_curves(accuracy_rows(run), made[0], title="A small Swin on Fashion-MNIST, three seeds")
    scopes(run, made[1])
    return made


def accuracy_rows(run: Run) -> list[dict[str, Any]]:
    """The rows that `dimap plot accuracy` reads; the level line is the dense model, as tuned."""
    rows = []
    asked = [("dense", 0.0), *product(run.settings["methods"], run.settings["ratios"])]
    for measure, panel in MEASURES.items():
        for method, ratio in asked:
            found = run.values(method, ratio, measure)
            if found and not run.seeds:
                found = {0: fmean(found.values())}
            for seed, value in found.items():
                row = {"method": method, "sparsity": ratio, "accuracy": value}
                rows.append({**row, "seed": seed, "panel": panel})
    return rows


def gaps(run: Run, axes: Any, measure: str, asked: Sequence[tuple[str, str | None]]) -> None:
    """Each method and scope less DIMAP: mean and standard error against the sparsity."""
    from report import paired

    axes.axhline(0, color=style.VERMILLION, linewidth=2, label="module (DIMAP)", zorder=1)
    ratios = run.settings["ratios"]
    for method, scope in asked:
        found = [
            paired(run.values(method, ratio, measure, scope), run.values("dimap", ratio, measure))
            for ratio in ratios
        ]
        if scope is None:
            label, (color, marker, dashes) = NAMES.get(method, method), METHODS[method]
        else:
            label, color, marker, dashes = SCOPED[method, scope]
        axes.errorbar(
            [100 * ratio for ratio in ratios],
            [gap[0] for gap in found],
            [gap[1] for gap in found],
            color=color,
            marker=marker,
            linestyle=dashes,
            elinewidth=0.8,
            capsize=2,
            label=label,
        )
    axes.set_xlabel("weights removed, %")
    axes.grid(axis="y")


@style.looking()
def scopes(run: Run, path: Path) -> None:
    """Each module definition less DIMAP's own, one shot."""
    from matplotlib.figure import Figure
    from report import SCOPES

    figure = Figure(figsize=(0.8 * style.WIDTH, 3.4))
    axes = figure.subplots()
    gaps(run, axes, "one_shot", list(SCOPES.values())[1:])
    axes.set_ylabel("accuracy less DIMAP's, points")
    axes.set_title("Where one threshold holds, one shot", loc="left", fontsize=style.TEXT + 1)
    axes.legend(fontsize=style.TEXT - 1)
    style.finish(figure, path)


@style.looking()
def features(run: Run, path: Path) -> None:
    """Cosines less DIMAP's, of patch tokens and of the class token."""
    from matplotlib.figure import Figure
    from report import feature_rows

    figure = Figure(figsize=(style.WIDTH, 3.8))
    both = figure.subplots(1, 2)
    asked = [pair for _, *pair in feature_rows(run) if pair != ["dimap", None]]
    for axes, token in zip(both, ("patch", "class"), strict=True):
        gaps(run, axes, token, [(method, scope) for method, scope in asked])
        axes.set_title(f"{token} tokens, one shot", loc="left")
    both[0].set_ylabel("cosine less DIMAP's")
    lines, labels = both[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    style.finish(figure, path)
