"""What the commands share: their options, arguments checked, errors told in one sentence."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

IN_HELP = (
    "A .safetensors file, a Hugging Face folder, a .pth, .pt or .bin file, or timm:NAME "
    "for a timm model with its pretrained weights."
)

Source = Annotated[str, typer.Argument(metavar="IN", help=IN_HELP, show_default=False)]
RandomInit = Annotated[
    bool, typer.Option("--random-init", help="Fresh weights for timm:NAME, for a dry run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Layers = Annotated[bool, typer.Option("--layers", help="Show every layer, too.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="DIMAP_DEBUG", help="Show the traceback of an error."),
]


def clean_up_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that outputs are cleaned up."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    """Turn an exception into one sentence on stderr and exit code 1; 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        complain("interrupted")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        complain(sentence(error))
        raise typer.Exit(1) from None


def sentence(error: Exception) -> str:
    """An error in one sentence, for a user."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error.strerror)
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)) and first:
        return str(error)
    if isinstance(error, RuntimeError) and first:  # of the operators, and of a forward pass
        return first
    return f"{type(error).__name__}: {first} (--debug shows where)"


def complain(text: str) -> None:
    """Say on stderr what went wrong."""
    message = Text("dimap: error: ", style="bold red").append(text, style="not bold default")
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)


def shares(options: list[str]) -> dict[str, float]:
    """--module NAME=SHARE, each name once."""
    shares: dict[str, float] = {}
    for option in options:
        name, _, text = option.partition("=")
        try:
            share = float(text)
        except ValueError:
            raise typer.BadParameter(f"--module must be NAME=SHARE, got {option!r}") from None
        if name in shares:
            raise typer.BadParameter(f"--module must name a module once, got {name!r} twice")
        shares[name] = share
    return shares


def sides(text: str | None) -> tuple[int, ...] | None:
    """--input-size: a side, HxW or CxHxW."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 3 or not all(side.isdecimal() and int(side) > 0 for side in parts):
        raise typer.BadParameter(f"--input-size must be like 224 or 3x224x224, got {text!r}")
    numbers = tuple(map(int, parts))
    return numbers * 2 if len(numbers) == 1 else numbers


def print_json(data: Any) -> None:
    """The one object of --json."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))
