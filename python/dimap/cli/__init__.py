"""The command line: `dimap prune` and `dimap inspect`."""

from __future__ import annotations

import platform
from typing import Annotated

import torch
import typer
from rich.console import Console

from .. import __version__, build_info
from .._progress import Bar
from .._support import (
    Debug,
    Json,
    Layers,
    RandomInit,
    Source,
    clean_up_on_signals,
    clear_errors,
    print_json,
)
from ..checkpoint import open_checkpoint
from ..checkpoint._inspect import inspect as inspect_checkpoint
from ._expand import expand
from ._plot import plot
from ._prune import prune
from .finetune import finetune

app = typer.Typer(
    help="Prune transformers by DIMAP: exact, in one shot, from the weights alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

# Each other command has a file of its own, _command_NAME.py, and one line here.
app.command()(prune)
app.command()(plot)
app.command()(finetune)
app.command()(expand)


@app.command()
def inspect(
    source: Source,
    random_init: RandomInit = False,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the modules of a checkpoint, their layers and weights, and how sparse they are."""
    with (
        clear_errors(debug),
        Bar("opening") as bar,
        open_checkpoint(source, random_init=random_init) as checkpoint,
    ):
        found = inspect_checkpoint(checkpoint, bar)
    if as_json:
        print_json(found.to_dict())
    else:
        console = Console()
        console.print(found)
        if layers:
            console.print(found.layer_table())


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
