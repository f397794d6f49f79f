"""The command line: `dimap prune` and `dimap inspect`."""

from __future__ import annotations

import json
import platform
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from . import __version__, build_info
from ._cli_support import clean_up_on_signals, clear_errors, shares, sides
from ._inspect import inspect as inspect_checkpoint
from ._progress import Bar
from ._prune_file import prune_file
from .checkpoint import open_checkpoint

app = typer.Typer(
    help="Prune transformers by DIMAP: exact, in one shot, from the weights alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

IN_HELP = (
    "A .safetensors file, a Hugging Face folder, a .pth, .pt or .bin file, or timm:NAME "
    "for a timm model with its pretrained weights."
)


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


Source = Annotated[str, typer.Argument(metavar="IN", help=IN_HELP, show_default=False)]
RandomInit = Annotated[
    bool, typer.Option("--random-init", help="Fresh weights for timm:NAME, for a dry run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="DIMAP_DEBUG", help="Show the traceback of an error."),
]


@app.command()
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
        _print_json({**files, "seconds": round(seconds, 3), "report": built.to_dict()})
        return
    console = Console()
    console.print(built)
    names = ", ".join(str(path) for path in (out, masks, report) if path)
    text = Text("wrote ", style="green").append(f"{names} in {seconds:.1f} s", style="default")
    console.print(text, soft_wrap=True)


@app.command()
def inspect(
    source: Source, random_init: RandomInit = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Show the modules of a checkpoint, their layers and weights, and how sparse they are."""
    with (
        clear_errors(debug),
        Bar("opening") as bar,
        open_checkpoint(source, random_init=random_init) as checkpoint,
    ):
        found = inspect_checkpoint(checkpoint, bar)
    if as_json:
        _print_json(found.to_dict())
    else:
        Console().print(found)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"dimap {__version__}")
    running = {"Python": platform.python_version(), "torch": torch.__version__}
    built = {f"built with {k}" if k == "torch" else k: v for k, v in build_info().items()}
    for key, value in (running | built).items():
        if key != "version":
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            typer.echo(f"  {key.replace('_', ' ')}: {'none' if text is None else text}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and how it was built.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command `dimap`."""
    clean_up_on_signals()
    app(prog_name="dimap")


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))
