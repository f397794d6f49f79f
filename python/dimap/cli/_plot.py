"""`dimap plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .._files import check_free
from .._progress import Bar
from .._support import IN_HELP, Debug, RandomInit, clear_errors
from ..checkpoint import open_checkpoint


class Picture(str, Enum):
    """What to draw."""

    kept = "kept"
    weights = "weights"
    mask = "mask"
    accuracy = "accuracy"


OPTIONS = {  # of some pictures only
    "masks": (Picture.kept, Picture.weights, Picture.mask),
    "random_init": (Picture.kept, Picture.weights, Picture.mask),
    "layer": (Picture.mask,),
    "block": (Picture.weights,),
    "dense": (Picture.accuracy,),
}
SOURCE_HELP = (
    f"{IN_HELP} What is zero in it is pruned, or what --masks say. For kept, a report of dimap "
    "prune --report FILE.json will do; for accuracy, a JSON file of results."
)


def plot(
    picture: Annotated[
        Picture,
        typer.Argument(
            help="kept: how much every layer keeps. weights: histograms by type of layer and "
            "block. mask: one layer's mask. accuracy: against sparsity.",
            show_default=False,
        ),
    ],
    source: Annotated[str, typer.Argument(metavar="IN", help=SOURCE_HELP, show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A .png or .svg file.", show_default=False),
    ],
    masks: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Masks of IN, from dimap prune --masks."),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For mask: the layer, as in layers.2.blocks.1.attn.qkv."),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BLOCK",
            help="For weights: a block to show, as in 2.5 (stage, block) or 5; as often as wanted.",
        ),
    ] = None,
    dense: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="For accuracy: that of the dense model."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Words above the picture.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    random_init: RandomInit = False,
    debug: Debug = False,
) -> None:
    """Draw a picture of a pruned checkpoint or of results. Needs matplotlib: dimap[plot].

    Checkpoints are read one tensor at a time.
    """
    given = {
        "masks": masks, "layer": layer, "block": block, "dense": dense,
        "random_init": random_init or None,
    }  # fmt: skip
    for option, pictures in OPTIONS.items():
        if given[option] is not None and picture not in pictures:
            names = " and ".join(other.value for other in pictures)
            raise typer.BadParameter(f"--{option.replace('_', '-')} is for {names} only")
    if picture is Picture.mask and layer is None:
        raise typer.BadParameter("give --layer NAME, the layer whose mask to draw")
    blocks = _blocks(block or [])
    with clear_errors(debug):
        from .. import plots

        plots.check_path(out)
        check_free(out, force=force)
        if picture is Picture.accuracy:
            plots.accuracy_curves(plots.load_rows(source), out, dense=dense, title=title)
        elif picture is Picture.kept and source.endswith(".json"):
            from ..report import Report

            if masks is not None:
                raise ValueError(f"masks must come with a checkpoint, got the report {source}")
            plots.kept_ratios(Report.from_json(Path(source)), out, title=title)
        else:
            with ExitStack() as opened, Bar("drawing"):
                checkpoint = opened.enter_context(open_checkpoint(source, random_init=random_init))
                found: Mapping[str, Any] | None = None
                if masks is not None:
                    from ..masks import open_masks

                    found = opened.enter_context(open_masks(masks))
                if picture is Picture.kept:
                    plots.kept_ratios(checkpoint, out, masks=found, title=title)
                elif picture is Picture.weights:
                    plots.weight_histograms(
                        checkpoint, out, masks=found, blocks=blocks or None, title=title
                    )
                else:
                    plots.mask_picture(checkpoint, str(layer), out, masks=found, title=title)
        Console().print(Text("wrote ", style="green").append(str(out), style="default"))


def _blocks(texts: Sequence[str]) -> list[int | tuple[int, int]]:
    blocks: list[int | tuple[int, int]] = []
    for text in texts:
        numbers = text.split(".")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise typer.BadParameter(f"--block must be like 2.5 or 5, got {text!r}")
        first, *second = map(int, numbers)
        blocks.append((first, second[0]) if second else first)
    return blocks
