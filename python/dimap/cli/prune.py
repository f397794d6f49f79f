"""`dimap prune`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .._files import check_free, replacing
from ..groups.plan import Normalize, Scope
from ..methods import METHODS
from ..report.text import make_console
from .budgets import BUDGETS, budgeted, parse_sparsity
from .common import (
    IN_HELP,
    Debug,
    Force,
    Json,
    Key,
    Layers,
    RandomInit,
    option,
    parse_input_size,
    parse_shares,
    print_json,
    print_wrote,
    report_errors,
)
from .grouping import Grouping, grouped
from .progress import Bar
from .recipes import Recipe, recipe_of, recipe_text

PATHS_HELP = f"""{IN_HELP} OUT is a file where IN is a file, a folder where it is a folder.

With --out-dir, any number of IN and no OUT. A folder with model.safetensors or its index is one
checkpoint; any other folder stands for the checkpoints directly in it; a quoted pattern, as in
'runs/*/best.pth', for those that match. Outputs keep their names, below DIR; those of a pattern the
folders that its wildcards matched, too."""


@grouped
@budgeted
def prune(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="IN... [OUT]", help=PATHS_HELP, show_default=False),
    ],
    sparsity: Annotated[
        str | None,
        option(
            "Share of the weights to drop, as 0.55 or 55%; auto shares a budget among the modules "
            "by what they lose.",
            "--sparsity",
            "-s",
            parser=parse_sparsity,
            metavar="SHARE|auto",
        ),
    ] = None,
    nm: Annotated[
        str | None,
        option(
            "Keep N of every M weights along a layer's input, as in 2:4, and no --sparsity; or "
            "auto, or auto:M, where the N of each layer is that of its share at --sparsity.",
            metavar="N:M",
        ),
    ] = None,
    module: Annotated[
        list[str] | None,
        option("Another share for one module, as in qkv=0.4.", metavar="NAME=SHARE"),
    ] = None,
    method: Annotated[
        Literal["dimap", "lamp", "uniform", "global_magnitude", "wanda"],
        option(
            "A name for a choice of --scope and --normalize; wanda ranks by magnitude times the "
            "norm of the input, within each row, and needs --input-norms."
        ),
    ] = "dimap",
    input_norms: Annotated[
        Path | None,
        option(
            "For --method wanda: safetensors of what dimap.saliency.input_norms gave.",
            metavar="FILE",
        ),
    ] = None,
    scope: Annotated[
        Scope | None,
        option(
            "Where one threshold holds: module (DIMAP), global (LAMP), layer (uniform "
            "magnitude), row (each output of a layer by itself), type (FC1 and FC2 apart), block or "
            "stage. Default: the method's."
        ),
    ] = None,
    normalize: Annotated[
        Normalize | None,
        option(
            "Where the squares of the weights are summed; scope means plain magnitude. "
            "Default: the method's."
        ),
    ] = None,
    form: Annotated[
        Literal["dense", "bitmask", "compact"],
        option(
            "bitmask stores one bit a weight and the nonzero values, compact has these "
            "compressed; `dimap expand` and dimap.load_file give the dense weights back bit by bit.",
            "--format",
        ),
    ] = "dense",
    key: Key = None,
    all_copies: Annotated[
        bool,
        option(
            "Give other copies of the weights the same masks, too: a teacher's in the file, "
            "earlier checkpoints in the folder. Averages (EMA) always get them.",
            "--all-copies",
        ),
    ] = False,
    masks: Annotated[
        Path | None, option("Write the masks, one bit a weight.", metavar="FILE")
    ] = None,
    report: Annotated[
        Path | None,
        option(
            "Write the report as JSON; or a folder with the JSON, pictures and a web page "
            "of its own (needs matplotlib).",
            metavar="FILE.json|DIR",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        option(
            "Prune every IN into DIR, and continue there if the same command ended early. "
            "--masks and --report then name folders, too.",
            metavar="DIR",
        ),
    ] = None,
    jobs: Annotated[
        int, option("With --out-dir: how many IN at a time.", "--jobs", "-j", min=1)
    ] = 1,
    checksum: Annotated[
        bool,
        option(
            "With --out-dir: note the SHA-256 of every file, so that those that were copied or "
            "touched are not taken for changed ones.",
            "--checksum",
        ),
    ] = False,
    force: Force = False,
    random_init: RandomInit = False,
    model: Annotated[
        str | None,
        option(
            "The model in IN, to count FLOPs, where IN does not say it: timm:NAME, "
            "torchvision:NAME, hf:ORG/NAME, or a folder with the config.json of transformers.",
            "--model",
            "--timm-model",
            metavar="NAME",
        ),
    ] = None,
    input_size: Annotated[
        str | None,
        option(
            "Input for FLOPs: 224, 224x224 or 3x224x224; of a model of language, tokens. Default: "
            "the model's.",
            metavar="SIZE",
        ),
    ] = None,
    recipe: Recipe = None,
    layers: Layers = False,
    as_json: Json = False,
    debug: Debug = False,
    *,
    budgets: dict[str, Any],
    grouping: Grouping,
) -> None:
    """Set the least important weights of a checkpoint to zero and write the result to OUT.

    OUT appears complete or not at all. Metadata, dtypes and a folder's other files are kept.

    With --out-dir many checkpoints are pruned. DIR/dimap-manifest.jsonl lists what is done, with
    length, times and inode of inputs and outputs: after a crash the same command continues and
    repeats nothing. Where the settings, an IN or an OUT differ from that list, OUT is kept and
    reported; --force replaces it. If one fails, the others go on, and the exit code is 1.

    Under torchrun its processes share the checkpoints, or the one checkpoint.
    """
    shares, size = parse_shares(module or []), parse_input_size(input_size)
    exact = nm is not None and not nm.startswith("auto")
    if sparsity is None and not shares and not exact and not budgets.keys() & BUDGETS:
        raise typer.BadParameter(
            "give --sparsity, or --module NAME=SHARE for every module, or --nm N:M, or a budget as "
            "--flops 60%"
        )
    if out_dir is None and len(paths) != 2:
        raise typer.BadParameter("give IN and OUT, or any number of IN and --out-dir DIR")
    for name, given in (("--jobs", jobs > 1), ("--checksum", checksum)):
        if out_dir is None and given:
            raise typer.BadParameter(f"{name} is for --out-dir: give it, or leave {name} out")
    with report_errors(debug, lambda: "the same command goes on" if out_dir else ""):
        ranking = None if exact else METHODS[method]
        settings: dict[str, Any] = {
            "sparsity": sparsity,
            "shares": shares or None,
            "nm": nm,
            "scope": scope or (ranking and ranking.scope),
            "normalize": normalize or (ranking and ranking.normalize),
            "method": method if METHODS[method].needs_norms else None,
            "input_norms": input_norms and str(input_norms),
            "random_init": random_init or None,
            "format": None if form == "dense" else form,
            "key": key,
            "all_copies": all_copies or None,
            **budgets,
            **grouping,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        more: dict[str, Any] = {"model": model, "input_size": size}
        if out_dir is not None:
            from ..checkpoint.many import Job
            from .prune_many import prune_many

            job = Job(out_dir, settings, more, masks, report, force, checksum, debug)
            prune_many(paths, job, jobs, as_json)
            return
        from ..distributed.launch import launched
        from ..stream import prune_checkpoint

        (source, out), start, made = paths, time.monotonic(), recipe_of(Path(paths[1]))
        again = recipe is not None and recipe.absolute() == made.absolute()
        if not os.path.lexists(out):  # else that is told
            check_free(made, folder=False, force=force or again)
        with launched() as ranks, Bar("opening", whole="pruning", wanted=ranks.rank == 0) as bar:
            more |= {"masks": masks, "report": report, "force": force}
            done = prune_checkpoint(source, out, **settings, **more, progress=bar, group=ranks)
            built = done.summary()
        if ranks.rank == 0:
            found = {"sparsity": built.sparsity, **({"got": built.got} if built.got else {})}
            with replacing(made, force=True) as temporary:
                temporary.write_text(recipe_text(ctx, found), encoding="utf-8")
    if ranks.rank > 0:
        return  # the first one tells
    seconds = time.monotonic() - start
    if as_json:
        files = {"in": source, "out": out, "masks": masks and str(masks), "recipe": str(made)}
        print_json({**files, "seconds": round(seconds, 3), "report": built.to_dict()})
        return

    console = make_console()
    console.print(built)
    if layers:
        console.print(built.layer_table())
    names = ", ".join(str(path) for path in (out, masks, report, made) if path)
    print_wrote(f"{names} in {seconds:.1f} s")
