"""`dimap prune`."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .._progress import Bar
from .._support import (
    IN_HELP,
    Debug,
    Json,
    Layers,
    RandomInit,
    clear_errors,
    print_json,
    shares,
    sides,
)
from ..checkpoint import open_checkpoint
from ..checkpoint._prune_file import prune_file
from ..checkpoint._prune_many import Job, Settings
from ..distributed.ranks import launched
from ..methods import METHODS
from ._prune_many import prune_many


class Format(str, Enum):
    """How pruned weights are stored."""

    dense = "dense"
    bitmask = "bitmask"


class Scope(str, Enum):
    """Where one threshold holds."""

    module = "module"
    global_ = "global"
    layer = "layer"
    type = "type"
    block = "block"
    stage = "stage"


class Normalize(str, Enum):
    """Where squares are summed."""

    layer = "layer"
    block = "block"
    stage = "stage"
    module = "module"
    scope = "scope"


class Method(str, Enum):
    """The methods that need no data."""

    dimap = "dimap"
    lamp = "lamp"
    uniform = "uniform"
    global_magnitude = "global_magnitude"


PATHS_HELP = f"""{IN_HELP} OUT is a file where IN is a file, a folder where it is a folder.

With --out-dir, any number of IN and no OUT. A folder with model.safetensors or its index is one
checkpoint; any other folder stands for the checkpoints directly in it; a quoted pattern, as in
'runs/*/best.pth', for those that match. Outputs keep their names, below DIR; those of a pattern the
folders that its wildcards matched, too."""


def prune(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="IN... [OUT]", help=PATHS_HELP, show_default=False),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", "-s", help="Share of the weights to drop, 0 to 1."),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", help="Another share for one module, as in qkv=0.4."),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="A ready-made choice of --scope and --normalize.")
    ] = Method.dimap,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="Where one threshold holds: module (DIMAP), global (LAMP), layer (uniform "
            "magnitude), type (FC1 and FC2 apart), block or stage. Default: the method's.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        Normalize | None,
        typer.Option(
            help="Where the squares of the weights are summed; scope means plain magnitude. "
            "Default: the method's.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="bitmask stores one bit a weight and the nonzero values; `dimap expand` and "
            "dimap.load_file give the dense weights back bit by bit.",
        ),
    ] = Format.dense,
    masks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the masks, one bit a weight.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json|DIR",
            help="Write the report as JSON; or a folder with the JSON, pictures and a web page "
            "of its own (needs matplotlib).",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Prune every IN into DIR, and continue there if the same command ended early. "
            "--masks and --report then name folders, too.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="With --out-dir: how many IN at a time.")
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
    random_init: RandomInit = False,
    timm_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="timm's name for the model in IN, to count FLOPs."),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Input for FLOPs: 224, 224x224 or 3x224x224. Default: the model's."
        ),
    ] = None,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set the least important weights of a checkpoint to zero and write the result to OUT.

    OUT appears complete or not at all. Metadata, dtypes and a folder's other files are kept.

    With --out-dir many checkpoints are pruned. DIR/dimap-manifest.jsonl tells what is done, with
    the SHA-256 of inputs and outputs: after a crash the same command continues and does nothing
    again. Where the settings, an IN or an OUT are other than told there, OUT is kept; --force
    replaces it. One that fails is told and the others go on; the exit code is then 1.

    Under torchrun its processes share the checkpoints, or the one checkpoint.
    """
    others = shares(module or [])
    size = sides(input_size)
    if sparsity is None and not others:
        raise typer.BadParameter("give --sparsity, or --module NAME=SHARE for every module")
    chosen = METHODS[method.value]
    if out_dir is not None:
        settings = Settings(
            sparsity,
            others,
            scope.value if scope else chosen.scope,
            normalize.value if normalize else chosen.normalize,
            random_init,
            form is Format.bitmask,
        )
        job = Job(out_dir, settings, masks, report, timm_model, size, force, debug)
        with clear_errors(debug):
            prune_many(paths, job, jobs, as_json)
        return
    if len(paths) != 2:
        raise typer.BadParameter("give IN and OUT, or any number of IN and --out-dir DIR")
    if jobs > 1:
        raise typer.BadParameter("--jobs is for --out-dir: give it, or leave --jobs out")
    source, out = paths[0], Path(paths[1])
    start = time.monotonic()
    with (
        clear_errors(debug),
        launched() as ranks,
        Bar("opening", wanted=ranks.rank == 0) as bar,
        open_checkpoint(source, random_init=random_init) as checkpoint,
    ):
        built = prune_file(
            checkpoint,
            out,
            sparsity,
            others,
            scope=scope.value if scope else chosen.scope,
            normalize=normalize.value if normalize else chosen.normalize,
            masks=masks,
            report=report,
            bitmask=form is Format.bitmask,
            force=force,
            timm_model=timm_model,
            input_size=size,
            bar=bar,
            ranks=ranks,
        )
    if ranks.rank > 0:
        return  # the first one tells
    seconds = time.monotonic() - start
    if as_json:
        files = {"in": source, "out": str(out), "masks": masks and str(masks)}
        print_json({**files, "seconds": round(seconds, 3), "report": built.to_dict()})
        return
    console = Console()
    console.print(built)
    if layers:
        console.print(built.layer_table())
    names = ", ".join(str(path) for path in (out, masks, report) if path)
    text = Text("wrote ", style="green").append(f"{names} in {seconds:.1f} s", style="default")
    console.print(text, soft_wrap=True)
