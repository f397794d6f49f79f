"""What the commands share: options, checks of arguments, how errors and results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .._errors import sentence
from ..report.text import make_console

IN_HELP = (
    "A file of safetensors or of torch.save, a Hugging Face folder, hf:ORG/NAME for one of the hub, "
    "or timm:NAME for a timm model with its pretrained weights."
)

Source = Annotated[str, typer.Argument(metavar="IN", help=IN_HELP, show_default=False)]
RandomInit = Annotated[
    bool, typer.Option("--random-init", help="Fresh weights for timm:NAME, for a dry run.")
]
Key = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where the weights lie in a file of torch.save, as state_dict_ema. Copies of them "
        "elsewhere in the file are left out of what is written.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Layers = Annotated[bool, typer.Option("--layers", help="Show every layer, too.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="DIMAP_DEBUG", help="Show the traceback of an error."),
]


@contextmanager
def report_errors(debug: bool, again: Callable[[], str] = str) -> Iterator[None]:
    """Turn an exception into one sentence on stderr and exit code 1; 130 for Ctrl-C.

    again: says how an interrupted command goes on.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_error(": ".join(filter(None, ["interrupted", again()])))
        raise typer.Exit(130) from None
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        print_error(sentence(error))
        raise typer.Exit(1) from None


def print_error(text: str) -> None:
    """Say on stderr what went wrong."""
    _print("dimap: error: ", text, "bold red", stderr=True)


def print_wrote(text: str) -> None:
    """Say which files were written."""
    _print("wrote ", text, "green")


def _print(head: str, text: str, style: str, *, stderr: bool = False) -> None:
    from rich.text import Text

    line = Text(head, style=style).append(text, style="not bold default")
    make_console(stderr=stderr, highlight=False).print(line, soft_wrap=True)


def print_json(data: Any) -> None:
    """The one object of --json."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def parse_shares(options: list[str]) -> dict[str, float]:
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


def parse_input_size(text: str | None) -> int | tuple[int, ...] | None:
    """--input-size: a side or a number of tokens, HxW or CxHxW."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 3 or not all(side.isdecimal() and int(side) > 0 for side in parts):
        raise typer.BadParameter(f"--input-size must be like 224 or 3x224x224, got {text!r}")
    numbers = tuple(map(int, parts))
    return numbers if len(numbers) > 1 else numbers[0]
