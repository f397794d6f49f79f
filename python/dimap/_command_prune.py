"""`dimap prune`."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ._cli_support import Debug, Json, RandomInit, Source, clear_errors, print_json, shares, sides
from ._progress import Bar
from ._prune_file import prune_file
from .checkpoint import open_checkpoint


class Scope(str, Enum):
    """Where one threshold holds."""

    module = "module"
    global_ = "global"
    layer = "layer"


class Normalize(str, Enum):
    """Where squares are summed."""

    layer = "layer"
    block = "block"
    stage = "stage"
    module = "module"


def prune(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A file where IN is a file, a folder where it is a folder."
        ),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", "-s", help="Share of the weights to drop, 0 to 1."),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", help="Another share for one module, as in qkv=0.4."),
    ] = None,
    scope: Annotated[
        Scope,
        typer.Option(
            help="Where one threshold holds: module (DIMAP), global (LAMP) or layer "
            "(uniform magnitude)."
        ),
    ] = Scope.module,
    normalize: Annotated[
        Normalize, typer.Option(help="Where the squares of the weights are summed.")
    ] = Normalize.layer,
    masks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the masks, one bit a weight.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the report as JSON.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
    random_init: RandomInit = False,
    timm_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="timm's name for the model in IN, to count FLOPs."),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Input for FLOPs: 224, 224x224 or 3x224x224. Default: the model's."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set the least important weights of a checkpoint to zero and write the result to OUT.

    OUT appears complete or not at all. Metadata, dtypes and a folder's other files are kept.
    """
    others = shares(module or [])
    size = sides(input_size)
    if sparsity is None and not others:
        raise typer.BadParameter("give --sparsity, or --module NAME=SHARE for every module")
    start = time.monotonic()
    with (
        clear_errors(debug),
        Bar("opening") as bar,
        open_checkpoint(source, random_init=random_init) as checkpoint,
    ):
        built = prune_file(
            checkpoint,
            out,
            sparsity,
            others,
            scope=scope.value,
            normalize=normalize.value,
            masks=masks,
            report=report,
            force=force,
            timm_model=timm_model,
            input_size=size,
            bar=bar,
        )
    seconds = time.monotonic() - start
    if as_json:
        files = {"in": source, "out": str(out), "masks": masks and str(masks)}
        print_json({**files, "seconds": round(seconds, 3), "report": built.to_dict()})
        return
    console = Console()
    console.print(built)
    names = ", ".join(str(path) for path in (out, masks, report) if path)
    text = Text("wrote ", style="green").append(f"{names} in {seconds:.1f} s", style="default")
    console.print(text, soft_wrap=True)
