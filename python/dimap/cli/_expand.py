"""`dimap expand`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .._progress import Bar
from .._support import Debug, Json, clear_errors, print_json
from ..bitmask import expand as expand_file


def expand(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A file or folder that `dimap prune --format bitmask` wrote."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A .safetensors file where IN is a file, a folder where it is one."
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the dense checkpoint that a bitmask one stands for, bit by bit.

    OUT appears complete or not at all.
    """
    start = time.monotonic()
    with clear_errors(debug), Bar("opening") as bar:
        expand_file(source, out, force=force, progress=bar)
        before, after = _bytes(source), _bytes(out)
    seconds = time.monotonic() - start
    if as_json:
        print_json(
            {
                "in": str(source),
                "out": str(out),
                "bytes_in": before,
                "bytes_out": after,
                "seconds": round(seconds, 3),
            }
        )
        return
    share = f"{before / 1e6:,.1f} MB, {100 * before / after:.1f} % of it"
    text = Text("wrote ", style="green").append(
        f"{out} in {seconds:.1f} s: {after / 1e6:,.1f} MB from {share}", style="default"
    )
    Console().print(text, soft_wrap=True)


def _bytes(path: Path) -> int:
    """Of a file, or of the safetensors files in a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(os.path.getsize(file) for file in files)
