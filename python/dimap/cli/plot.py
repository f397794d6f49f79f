"""`dimap plot`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from .common import IN_HELP, Debug, RandomInit, option, print_wrote, report_errors
from .grouping import Grouping, grouped, open_grouped
from .progress import Bar

Picture = Literal["kept", "weights", "mask", "accuracy"]
OPTIONS: dict[str, tuple[Picture, ...]] = {  # of some pictures only
    "masks": ("kept", "weights", "mask"),
    "random_init": ("kept", "weights", "mask"),
    "layer": ("mask",),
    "block": ("weights",),
    "dense": ("accuracy",),
}
SOURCE_HELP = (
    f"{IN_HELP} What is zero in it is pruned, or what --masks say. For kept, a report of dimap "
    "prune --report FILE.json will do; for accuracy, a JSON file of results."
)


def parse_picture(text: str) -> str:
    """What is drawn; with a way out for who gave a file first."""
    if text not in get_args(Picture):
        raise typer.BadParameter(
            f"the picture comes first, one of {', '.join(get_args(Picture))}, as in dimap plot kept IN "
            f"OUT, got {text!r}"
        )
    return text


@grouped
def plot(
    picture: Annotated[
        str,
        typer.Argument(
            parser=parse_picture,
            metavar=f"{{{'|'.join(get_args(Picture))}}}",
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
        Path | None, option("Masks of IN, from dimap prune --masks.", metavar="FILE")
    ] = None,
    layer: Annotated[
        str | None,
        option("For mask: the layer, as in layers.2.blocks.1.attn.qkv.", metavar="NAME"),
    ] = None,
    block: Annotated[
        list[str] | None,
        option(
            "For weights: a block to show, as in 2.5 (stage, block) or 5; as often as wanted.",
            metavar="BLOCK",
        ),
    ] = None,
    dense: Annotated[
        float | None, option("For accuracy: that of the dense model.", metavar="PERCENT")
    ] = None,
    title: Annotated[str | None, option("Words above the picture.")] = None,
    force: Annotated[bool, option("Replace OUT if it exists.", "--force")] = False,
    random_init: RandomInit = False,
    debug: Debug = False,
    *,
    grouping: Grouping,
) -> None:
    r"""Draw a picture of a pruned checkpoint or of results. Needs matplotlib: torch-dimap\[plot].

    Checkpoints are read one tensor at a time.
    """
    given = {"masks": masks, "layer": layer, "block": block, "dense": dense}
    given["random_init"] = random_init or None
    for name, pictures in OPTIONS.items():
        if given[name] is not None and picture not in pictures:
            names = " and ".join(pictures)
            raise typer.BadParameter(f"--{name.replace('_', '-')} is for {names} only")
    if picture == "mask" and layer is None:
        raise typer.BadParameter("give --layer NAME, the layer whose mask to draw")
    blocks = _parse_blocks(block or [])
    with report_errors(debug), ExitStack() as opened:
        from .. import plots
        from .._files import check_free

        plots.check_path(out)
        check_free(out, force=force)
        if picture == "accuracy":
            plots.accuracy_curves(plots.load_rows(source), out, dense=dense, title=title)
        elif picture == "kept" and source.endswith(".json"):
            from ..report import Report

            if masks is not None:
                raise ValueError(f"masks must come with a checkpoint, got the report {source}")
            plots.kept_ratios(Report.from_json(Path(source)), out, title=title)
        else:
            from ..masks import open_masks

            opened.enter_context(Bar("drawing"))
            checkpoint = open_grouped(source, grouping, random_init=random_init)
            found = opened.enter_context(open_masks(masks)) if masks is not None else None
            options: dict[str, Any] = {"masks": found, "title": title}
            if picture == "kept":
                plots.kept_ratios(checkpoint, out, **options)
            elif picture == "weights":
                plots.weight_histograms(checkpoint, out, blocks=blocks or None, **options)
            else:
                plots.mask_picture(checkpoint, str(layer), out, **options)
    print_wrote(str(out))


def _parse_blocks(texts: Sequence[str]) -> list[int | tuple[int, int]]:
    blocks: list[int | tuple[int, int]] = []
    for text in texts:
        numbers = text.split(".")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise typer.BadParameter(f"--block must be like 2.5 or 5, got {text!r}")
        first, *second = map(int, numbers)
        blocks.append((first, second[0]) if second else first)
    return blocks
