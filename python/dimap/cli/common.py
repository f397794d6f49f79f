"""What the commands share: options, checks of arguments, how errors and results are printed."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .._errors import sentence
from ..groups.plan import share
from ..report.text import make_console


def option(text: str, *names: str, **details: Any) -> Any:
    """typer's option: its help, then its names where these are not the parameter's own."""
    return typer.Option(*names, help=text, **details)


IN_HELP = (
    "A file of safetensors or of torch.save, a Hugging Face folder, hf:ORG/NAME for one of the hub, "
    "or timm:NAME for a timm model with its pretrained weights."
)

Source = Annotated[str, typer.Argument(metavar="IN", help=IN_HELP, show_default=False)]
RandomInit = Annotated[bool, option("Fresh weights for timm:NAME, for a dry run.", "--random-init")]
Key = Annotated[
    str | None,
    option(
        "Where the weights lie in a file of torch.save, as state_dict_ema. Copies of them "
        "elsewhere in the file are left out of what is written.",
        metavar="NAME",
    ),
]
Force = Annotated[bool, option("Replace outputs that exist.", "--force")]
Json = Annotated[bool, option("Print one JSON object and nothing else.", "--json")]
Layers = Annotated[bool, option("Show every layer, too.", "--layers")]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug", envvar="DIMAP_DEBUG")]


def adding(
    name: str, parse: Callable[..., Any], options: Iterable[inspect.Parameter] = ()
) -> Callable[[Any], Any]:
    """Give a command more options; it is called with what `parse` makes of them as one argument.

    options: those that `parse` declares as its own parameters, unless others are given.
    """
    declared = list(options or inspect.signature(parse, eval_str=True).parameters.values())
    added = [option.replace(kind=option.KEYWORD_ONLY) for option in declared]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        # No functools.wraps: typer would read the annotations of what is wrapped.
        def run(*arguments: Any, **named: Any) -> None:
            given = {option.name: named.pop(option.name, option.default) for option in added}
            command(*arguments, **named, **{name: parse(**given)})

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        kept = [p for p in own.parameters.values() if p.name != name]
        run.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return run

    return decorate


def read_toml(file: Path, name: str) -> dict[str, Any]:
    """What a TOML file says. name: of the option that was given the file, for errors."""
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        found: dict[str, Any] = toml.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{name}: {file}: {error.strerror}") from None
    except ValueError as error:  # of TOML, or of bytes that are no text
        raise typer.BadParameter(f"{name} must be a TOML file, got {file}: {error}") from None
    return found


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
            found = share(f"--module {name}", text)
        except ValueError as error:
            raise typer.BadParameter(
                f"--module must be NAME=SHARE, got {option!r}: {error}"
            ) from None
        if name in shares:
            raise typer.BadParameter(f"--module must name a module once, got {name!r} twice")
        shares[name] = found
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
