"""`dimap recipe`."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from .prune import prune
from .recipes import ELSEWHERE, recipe_text


def recipe(ctx: typer.Context, **_: Any) -> None:
    """Print the options as a recipe for `dimap prune --recipe FILE.toml`.

    A recipe that is given is checked, and what it says printed with the other options.
    """
    typer.echo(recipe_text(ctx), nl=False)


_own = inspect.signature(prune, eval_str=True)
recipe.__signature__ = _own.replace(  # type: ignore[attr-defined]
    parameters=[
        p.replace(kind=p.KEYWORD_ONLY)
        for p in _own.parameters.values()
        if p.name not in ELSEWHERE - {"recipe"}
    ]
)
