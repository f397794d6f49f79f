"""`dimap expand`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, Json, option, print_json, print_wrote, report_errors
from .grouping import Grouping, grouped, open_grouped
from .progress import Bar


@grouped
def expand(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A file or folder that `dimap prune --format bitmask` or compact wrote, or "
            "compressed-tensors as sparse-bitmask.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A .safetensors file where IN is a file, a folder where it is one."
        ),
    ],
    force: Annotated[bool, option("Replace OUT where it exists.", "--force")] = False,
    as_json: Json = False,
    debug: Debug = False,
    *,
    grouping: Grouping,
) -> None:
    """Write the dense checkpoint that a bitmask one stands for, bit by bit.

    OUT appears complete or not at all. Every stored weight is expanded, whatever its module; the
    options that tell modules are checked against IN, and its modules are shown.
    """
    start = time.monotonic()
    with report_errors(debug), Bar("opening") as bar:
        from .. import bitmask

        found = None
        if grouping:
            from ..checkpoint import inspect as work

            found = work.inspect(open_grouped(source, grouping), bar)
        bitmask.expand(source, out, force=force, progress=bar)
        before, after = _bytes(source), _bytes(out)
    seconds = time.monotonic() - start
    if as_json:
        told = {"in": str(source), "out": str(out), "bytes_in": before, "bytes_out": after}
        modules = {} if found is None else {"modules": found.to_dict()["modules"]}
        print_json({**told, "seconds": round(seconds, 3), **modules})
        return
    if found is not None:
        from .inspect import print_inspection

        print_inspection(found, layers=False)
    share = f"{before / 1e6:,.1f} MB, {100 * before / after:.1f} % of it"
    print_wrote(f"{out} in {seconds:.1f} s: {after / 1e6:,.1f} MB from {share}")


def _bytes(path: Path) -> int:
    """Of a file, or of the safetensors files in a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(os.path.getsize(file) for file in files)
