"""The options that say which weights are pruned, and which together: the same for every command."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ..groups.roles import TRANSFORMER

# Arguments of `dimap.find_modules`: patterns, family, ignore; those that were given.
Grouping: TypeAlias = dict[str, Any]
PANEL = "Which weights"

Pattern = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE=REGEX",
        help="Name a module of your own: weights whose whole names the regex matches. The first that "
        "matches wins; (?P<block>…) tells the block, (?P<part>q|k|v) joins tensors to one layer.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
PatternsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        help="The same from a file: MODULE = 'REGEX', or a list of them; a list in the list is one "
        "layer of several tensors.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Never prune the layers or parameters whose whole names the regex matches.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Try this family alone (`dimap families` lists them); {TRANSFORMER} groups any "
        "transformer by the words of its names, and shows how.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
OPTIONS = {
    "pattern": Pattern,
    "patterns": PatternsFile,
    "ignore": Ignore,
    "family": FamilyName,
}


def adding(
    options: Mapping[str, Any], name: str, parse: Callable[..., Any]
) -> Callable[[Any], Any]:
    """Give a command these options; it is called with what `parse` makes of them as one argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name != name]
        rest = [p for p in kept if p.kind is p.VAR_KEYWORD]
        added = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for option, kind in options.items()
        ]

        # No functools.wraps: typer would read the annotations of what is wrapped.
        def run(*arguments: Any, **named: Any) -> None:
            given = {option: named.pop(option, None) for option in options}
            command(*arguments, **named, **{name: parse(**given)})

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        parameters = [*(p for p in kept if p not in rest), *added, *rest]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def parse(
    pattern: list[str] | None,
    patterns: Path | None,
    ignore: list[str] | None,
    family: str | None,
) -> Grouping:
    """The options as arguments of `dimap.find_modules`, of values that JSON has."""
    found: Grouping = {}
    modules: dict[str, list[Any]] = {}
    for option in pattern or []:
        name, equals, regex = option.partition("=")
        if not equals or not name or not regex:
            raise typer.BadParameter(f"--pattern must be MODULE=REGEX, got {option!r}")
        modules.setdefault(name, []).append(regex)
    if patterns is not None:
        for name, rows in _read(patterns).items():
            modules.setdefault(name, []).extend([rows] if isinstance(rows, str) else rows)
    if modules and family is not None:
        raise typer.BadParameter("--family must be given without --pattern and --patterns")
    if modules:
        found["patterns"] = modules
    if family is not None:
        found["family"] = family
    if ignore:
        found["ignore"] = list(ignore)
    return found


grouped = adding(OPTIONS, "grouping", parse)


def _read(file: Path) -> Mapping[str, Any]:
    found = read_toml(file, "--patterns")
    for name, rows in found.items():
        if not isinstance(rows, (str, list)):
            raise typer.BadParameter(
                f"--patterns: {file}: {name} must be a regex or a list of them, got {rows!r}"
            )
    if not found:
        raise typer.BadParameter(f"--patterns must name a module, got none in {file}")
    return found


def read_toml(file: Path, option: str) -> dict[str, Any]:
    """What a TOML file says; the option that names it is told in errors."""
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        found: dict[str, Any] = toml.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{option}: {file}: {error.strerror}") from None
    except ValueError as error:  # of TOML, or of bytes that are no text
        raise typer.BadParameter(f"{option} must be a TOML file, got {file}: {error}") from None
    return found
