"""The command line: a file for each command, which is imported when its command is run."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__, build_info
from .._errors import sentence, unwind_on_signals

COMMANDS = {  # what `dimap --help` says of them
    "prune": "Set the least important weights of checkpoints to zero.",
    "recipe": "Print the options of a pruning as a file, to repeat it.",
    "families": "List the models whose parameter names are known, and how others are pruned.",
    "sensitivity": "Show what each module of a checkpoint loses if it alone is pruned.",
    "inspect": "Show the modules of a checkpoint, their layers and weights, and how sparse they are.",
    "expand": "Write the dense checkpoint that a bitmask one stands for.",
    "plot": "Draw a picture of a pruned checkpoint or of results.",
    "bench": "Time the operators on this machine, beside a copy and plain PyTorch.",
    "finetune": "Train a pruned checkpoint; its pruned weights stay exactly zero.",
}


class Commands(TyperGroup):
    """`COMMANDS` by name; NAME.py is imported, and its function NAME called, when NAME is run."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}

    def main(self, *args: Any, **more: Any) -> Any:
        from typer import rich_utils

        rich_utils.rich_format_error = _print_usage_error  # type: ignore[assignment]
        return super().main(*args, **more)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        single = typer.Typer(add_completion=False)
        single.command(name)(getattr(import_module(f".{name}", __name__), name))
        return name, typer.main.get_command(single), rest


def _print_usage_error(error: Any) -> None:
    """Say what is wrong with the arguments as other errors are said, in one line."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
        return
    from .common import print_error

    text = error.format_message().removeprefix("Invalid value: ").replace("Value error, ", "")
    text = re.sub(
        r"^Invalid value for '(--[\w-]+)': (?=\1)", "", text
    )  # which the error names, too
    context = getattr(error, "ctx", None)
    print_error(f"{text} (see {context.command_path} --help)" if context else text)


app = typer.Typer(
    cls=Commands,
    help="Prune transformers by DIMAP: exact, in one shot, from the weights alone.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    import platform

    import torch

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
    unwind_on_signals()
    if os.environ.get("NO_COLOR"):  # no bold either
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None
    try:
        try:
            app(prog_name="dimap")
        finally:
            sys.stdout.flush()
    except OSError as error:  # the terminal, or the file in its place, takes no more
        from .common import print_error

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        if not isinstance(error, BrokenPipeError):
            print_error(f"the results cannot be printed: {sentence(error)}")
        sys.exit(1)
