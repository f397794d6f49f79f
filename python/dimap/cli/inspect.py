"""`dimap inspect`."""

from __future__ import annotations

from .common import Debug, Json, Layers, RandomInit, Source, print_json, report_errors
from .progress import Bar


def inspect(
    source: Source,
    random_init: RandomInit = False,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the modules of a checkpoint, their layers and weights, and how sparse they are."""
    with report_errors(debug), Bar("opening") as bar:
        from .. import checkpoint
        from ..checkpoint import _inspect

        with checkpoint.open_checkpoint(source, random_init=random_init) as opened:
            found = _inspect.inspect(opened, bar)
    if as_json:
        print_json(found.to_dict())
        return
    from rich.console import Console

    console = Console()
    console.print(found)
    if layers:
        console.print(found.layer_table())
