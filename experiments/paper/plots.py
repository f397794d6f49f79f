"""The plots of the protocol's results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimap.plots import accuracy_curves, style

if TYPE_CHECKING:
    from report import Run

MEASURES = {"one_shot": "one shot", "tuned": "fine-tuned"}
LOOKS: dict[str, tuple[str, str, Any]] = {
    "type": (style.ORANGE, "D", (0, (4, 1, 1, 1))),
    "block": (style.PURPLE, "v", (0, (1, 1))),
    "stage": (style.GREEN, "^", (0, (6, 1, 1, 1, 1, 1))),
    "network": (style.BLUE, "s", (0, (5, 1.5))),
    "layer": (style.GREY, "x", (0, (2.5, 1.5))),
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Write every plot that the results allow; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / "paper-accuracy.png", folder / "paper-scopes.png"]
    accuracy_curves(accuracy_rows(run), made[0], title="A small Swin on Fashion-MNIST, three seeds")
    scopes(run, made[1])
    if rows := feature_rows(run):
        made.append(folder / "paper-features.png")
        accuracy_curves(
            rows,
            made[-1],
            dense=run.feature("dense", 0.0),
            title="k-NN on features of a real ViT-S/14, one shot",
        )
    return made


def accuracy_rows(run: Run) -> list[dict[str, Any]]:
    """The rows that `dimap plot accuracy` reads; the level line is the dense model, as tuned."""
    rows = []
    for measure, panel in MEASURES.items():
        for seed, value in run.values("dense", 0.0, measure).items():
            row = {"method": "dense", "sparsity": 0.0, "accuracy": value}
            rows.append({**row, "seed": seed, "panel": panel})
        for method in run.settings["methods"]:
            for ratio in run.ratios:
                for seed, value in run.values(method, ratio, measure).items():
                    row = {"method": method, "sparsity": ratio, "accuracy": value}
                    rows.append({**row, "seed": seed, "panel": panel})
    return rows


def feature_rows(run: Run) -> list[dict[str, Any]]:
    return [
        {"method": c["method"], "sparsity": c["ratio"], "accuracy": c["one_shot"]}
        for c in run.cells
        if c["kind"] == "features" and c["method"] != "dense"
    ]


@style.looking()
def scopes(run: Run, path: Path) -> None:
    """Each module definition less DIMAP's own, one shot: mean and standard error over seeds."""
    from matplotlib.figure import Figure
    from report import SCOPES, paired

    figure = Figure(figsize=(0.8 * style.WIDTH, 3.4))
    axes = figure.subplots()
    axes.axhline(0, color=style.VERMILLION, linewidth=2, label="module (DIMAP)", zorder=1)
    x = [100 * ratio for ratio in run.ratios]
    for method, scope in list(SCOPES.values())[1:]:
        gaps = [
            paired(
                run.values(method, ratio, "one_shot", scope), run.values("dimap", ratio, "one_shot")
            )
            for ratio in run.ratios
        ]
        label = scope or {"lamp": "network", "uniform": "layer"}[method]
        color, marker, dashes = LOOKS[label]
        axes.errorbar(
            x,
            [gap[0] for gap in gaps],
            [gap[1] for gap in gaps],
            color=color,
            marker=marker,
            linestyle=dashes,
            elinewidth=0.8,
            capsize=2,
            label={"network": "network (LAMP)", "layer": "layer (uniform)"}.get(label, label),
        )
    axes.set_xlabel("weights removed, %")
    axes.set_ylabel("accuracy less DIMAP's, points")
    axes.set_title("Where one threshold holds, one shot", loc="left", fontsize=style.TEXT + 1)
    axes.grid(axis="y")
    axes.legend(fontsize=style.TEXT - 1)
    style.finish(figure, path)
