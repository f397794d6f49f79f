"""Recipes: what the options say of a pruning, in a TOML file; the options are their schema.

A key is an option's name without its dashes, as `min-keep = "5%"`; an option that may be given several
times is a list. What the command line says goes before what the recipe says.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from .budgets import parse_share, parse_sparsity
from .common import option, read_toml

# Where things are, and how they are shown: no part of what is done.
ELSEWHERE = {
    "paths", "masks", "report", "out_dir", "jobs", "checksum", "force", "layers", "as_json", "debug",
    "recipe",
}  # fmt: skip


def options(ctx: typer.Context) -> dict[str, inspect.Parameter]:
    """The options that a recipe may say, by their names without dashes: those of the command."""
    declared = inspect.signature(ctx.command.callback, eval_str=True).parameters  # type: ignore[arg-type]
    return {
        option.opts[0].lstrip("-"): declared[option.name]
        for option in ctx.command.params
        if option.name in declared and option.name not in ELSEWHERE
    }


def _schema(options: Mapping[str, inspect.Parameter]) -> Any:
    """A pydantic model of the options."""
    from pydantic import BeforeValidator, ConfigDict, Field, create_model

    def parsing(parser: Callable[[Any], Any]) -> BeforeValidator:
        def parse(value: Any) -> Any:
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError("must be a string or a number")
            try:
                said = parser(value)
                return parse_share(said) if parser is parse_sparsity and said != "auto" else said
            except typer.BadParameter as error:
                raise ValueError(error.message) from None

        return BeforeValidator(parse)

    fields: dict[str, Any] = {}
    for name, parameter in options.items():
        kind, [info] = parameter.annotation.__origin__, parameter.annotation.__metadata__
        if info.parser is not None:
            kind = Annotated[Any, parsing(info.parser)]
        elif kind == Path | None:
            kind = str
        fields[parameter.name] = (kind, Field(None, alias=name))
    return create_model("Recipe", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _read(ctx: typer.Context, file: Path | None) -> Path | None:
    """Take what a recipe says for the defaults of the options."""
    if file is None:
        return None
    from pydantic import ValidationError

    found, known = read_toml(file, "--recipe"), options(ctx)
    try:
        said = _schema(known)(**found).model_dump(exclude_unset=True)
    except ValidationError as errors:
        lines = file.read_text(encoding="utf-8").splitlines()
        told = []
        for error in errors.errors():
            key = str(error["loc"][0])
            here = re.compile(rf"""\s*\[?["']?{re.escape(key)}["']?\s*[=\].]""")
            line = next((i for i, text in enumerate(lines, 1) if here.match(text)), 1)
            text = error["msg"].removeprefix("Value error, ")
            if ", got " not in text:
                text = f"{text}, got {error['input']!r}"
            if error["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, known, 1)
                better = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                text = f"is no option of dimap prune; {better}"
            told.append((line, f"{file}, line {line}: {key}: {text}"))
        raise typer.BadParameter("; ".join(text for _, text in sorted(told))) from None
    ctx.default_map = {**(ctx.default_map or {}), **said}
    return file


Recipe = Annotated[
    Path | None,
    option(
        "Options from a file, as `dimap recipe` prints them and as they are written beside OUT.",
        metavar="FILE.toml",
        is_eager=True,
        callback=_read,
    ),
]


def recipe_text(ctx: typer.Context, found: Mapping[str, Any] | None = None) -> str:
    """The options that were given, as a recipe. found: what came of it, said in comments."""
    lines = [f"# dimap {__version__}: dimap prune IN OUT --recipe FILE.toml"]
    lines += [f"# {name}: {json.dumps(value)}" for name, value in (found or {}).items()]
    for key, parameter in options(ctx).items():
        source = ctx.get_parameter_source(parameter.name)
        if source is not None and source.name != "DEFAULT":
            value = ctx.params[parameter.name]
            if isinstance(value, (list, tuple)):
                value = [str(each) for each in value]
            elif not isinstance(value, (bool, int, float)):
                value = str(value)
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def recipe_of(out: Path) -> Path:
    """Where the recipe of an output is: beside it, under its whole name."""
    return Path(f"{out}.recipe.toml")
