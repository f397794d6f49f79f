"""The options that say which weights are pruned, and which together: the same for every command."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ..groups.roles import TRANSFORMER
from .common import adding, option, read_toml

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

# Arguments of `dimap.find_modules`: patterns, family, ignore; those that were given.
Grouping: TypeAlias = dict[str, Any]
_option = partial(option, rich_help_panel="Which weights")


def parse(
    pattern: Annotated[
        list[str] | None,
        _option(
            "Name a module of your own: weights whose whole names the regex matches. The first that "
            "matches wins; (?P<block>…) tells the block, (?P<part>q|k|v) joins tensors to one layer.",
            metavar="MODULE=REGEX",
        ),
    ] = None,
    patterns: Annotated[
        Path | None,
        _option(
            "The same from a file: MODULE = 'REGEX', or a list of them; a list in the list is one "
            "layer of several tensors.",
            metavar="FILE.toml",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        _option(
            "Never prune the layers or parameters whose whole names the regex matches.",
            metavar="REGEX",
        ),
    ] = None,
    family: Annotated[
        str | None,
        _option(
            f"Try this family alone (`dimap families` lists them); {TRANSFORMER} groups any "
            "transformer by the words of its names, and shows how.",
            metavar="NAME",
        ),
    ] = None,
) -> Grouping:
    """The options as arguments of `dimap.find_modules`, of values that JSON has."""
    modules: dict[str, list[Any]] = {}
    for given in pattern or []:
        name, equals, regex = given.partition("=")
        if not equals or not name or not regex:
            raise typer.BadParameter(f"--pattern must be MODULE=REGEX, got {given!r}")
        modules.setdefault(name, []).append(regex)
    for name, rows in (_read(patterns) if patterns is not None else {}).items():
        modules.setdefault(name, []).extend([rows] if isinstance(rows, str) else rows)
    if modules and family is not None:
        raise typer.BadParameter("--family must be given without --pattern and --patterns")
    found = {"patterns": modules or None, "family": family, "ignore": list(ignore or ()) or None}
    return {name: value for name, value in found.items() if value is not None}


grouped = adding("grouping", parse)


def open_grouped(source: str | Path, grouping: Grouping, **how: Any) -> Checkpoint:
    """`dimap.checkpoint.open_checkpoint`; its modules are those that the options tell."""
    from ..checkpoint import open_checkpoint
    from ..groups import choose

    choice = choose(**grouping)  # a wrong one is told first
    checkpoint = open_checkpoint(source, **how)
    checkpoint.choice = choice
    return checkpoint


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
