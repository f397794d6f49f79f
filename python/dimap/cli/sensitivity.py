"""`dimap sensitivity`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ..report.text import Column, make_console, table
from .budgets import parse_share
from .common import (
    Debug,
    Json,
    Key,
    Layers,
    RandomInit,
    Source,
    option,
    print_json,
    print_wrote,
    report_errors,
)
from .finetune import with_settings
from .grouping import Grouping, grouped, open_grouped
from .progress import Bar

# What `Settings` says of an evaluation.
JUDGING = (
    "timm_model", "val_split", "class_map", "input_size", "mean", "std", "crop_pct", "pad", "batch_size",
    "workers", "amp",
)  # fmt: skip
SHOWN = (10, 30, 50, 70, 80, 90)  # percent, in the table


@with_settings(*JUDGING)
@grouped
def sensitivity(
    source: Source,
    data: Annotated[
        str | None,
        option(
            "Measure accuracy, too, with each module alone pruned: a folder with val/, or a data "
            "set of timm's factory, as in torch/fashion_mnist:FOLDER.",
            metavar="DATA",
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        option("With --data: a sparsity to measure at. Default: 50%, 70%, 90%.", metavar="SHARE"),
    ] = None,
    plot: Annotated[Path | None, option("Draw the curves, .png or .svg.", metavar="FILE")] = None,
    key: Key = None,
    random_init: RandomInit = False,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
    *,
    grouping: Grouping,
    settings: dict[str, Any],
) -> None:
    """Show what each module, and each layer, loses if it alone is pruned, at every sparsity.

    That is the relative Frobenius distortion |W - W'| / |W|, from one reading of the weights.
    """
    shares = [parse_share(text) for text in at or ("50%", "70%", "90%")]
    with report_errors(debug):
        from ..checkpoint.sensitivity import measure_checkpoint

        if plot is not None:
            from ..plots import check_path

            check_path(plot)
        with Bar("opening") as bar:
            checkpoint = open_grouped(source, grouping, key=key, random_init=random_init)
            found = measure_checkpoint(checkpoint, bar)
        if data is not None:
            from ..finetuning.sensitivity import accuracy_alone

            choice = checkpoint.choice
            measured = accuracy_alone(source, data, shares, choice=choice, **settings)
            found = replace(found, accuracy=measured)
        if plot is not None:
            from ..plots import sensitivity_curves

            sensitivity_curves(found, plot)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, layers=layers)
    if plot is not None and not as_json:
        print_wrote(str(plot))


def _print(found: Any, *, layers: bool) -> None:
    """A line for each module, with `layers` for each layer, and what was measured."""
    from rich.text import Text

    console = make_console()
    names = Column("", lambda curve: curve.name, left=True)
    weights = Column("weights", lambda curve: f"{curve.weights:,}")
    losses = [Column(f"{share} %", partial(_loss, share)) for share in SHOWN]
    rows = [*found.modules, *(found.layers if layers else ())]
    shown = table([names, weights, *losses], rows)
    shown.title, shown.title_justify = "distortion in percent, by the share removed", "left"
    shown.rows[len(found.modules) - 1].end_section = True
    console.print(shown)
    if found.accuracy:
        shares = enumerate(found.accuracy["sparsities"])
        tops = [Column(f"{100 * share:g} %", partial(_top1, at)) for at, share in shares]
        names = Column("", lambda row: row[0], left=True)
        shown = table([names, *tops], list(found.accuracy["modules"].items()))
        shown.title = f"top-1 in percent, one module pruned; {found.accuracy['dense']:.2f} dense"
        console.print(shown)
    for note in found.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)


def _loss(share: int, curve: Any) -> str:
    return f"{100 * curve.distortion[share]:.2f}"


def _top1(at: int, module: tuple[str, list[float]]) -> str:
    return f"{module[1][at]:.2f}"
