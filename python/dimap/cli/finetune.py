"""`dimap finetune`: the options of `Settings` and where things are."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..finetuning.settings import HISTORY, STATE, Settings
from .common import IN_HELP, Debug, Json, adding, option, print_json, print_wrote, report_errors
from .grouping import Grouping, grouped


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def with_settings(*names: str) -> Callable[[Any], Any]:
    """Give a command one option for each field of `Settings`, or for those named, beside its own."""
    options = []
    for name in names or Settings.model_fields:
        field = Settings.model_fields[name]
        kind: Any = field.annotation
        details: dict[str, Any] = {"rich_help_panel": field.json_schema_extra["panel"]}  # type: ignore[index]
        if name in ("mean", "std"):
            kind = str | None
            details |= {"parser": _numbers, "metavar": "N,N,N"}
        names_of: tuple[str, ...] = ()
        if name == "timm_model":  # as `dimap prune` calls it
            names_of, details["metavar"] = ("--model", "--timm-model"), "timm:NAME"
        kind = Annotated[kind, option(str(field.description), *names_of, **details)]
        parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
        options.append(parameter.replace(default=field.default))
    return adding("settings", dict, options)


@with_settings()
@grouped
def finetune(
    *,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help=IN_HELP, show_default=False)
    ],
    data: Annotated[
        str,
        option(
            "A folder with train/ and val/, or a data set of timm's factory with its folder, "
            "as in torch/fashion_mnist:FOLDER. Nothing is downloaded.",
            metavar="DATA",
        ),
    ],
    out: Annotated[Path, option("Where the results go.", metavar="FOLDER")],
    masks: Annotated[
        Path | None,
        option("The masks to hold. Without them the zeros of CHECKPOINT are held.", metavar="FILE"),
    ] = None,
    dense: Annotated[bool, option("Hold nothing.", "--dense")] = False,
    teacher: Annotated[
        str | None,
        option("A dense model whose outputs are learned too.", metavar="CHECKPOINT"),
    ] = None,
    device: Annotated[str | None, option("cuda, cpu, …; a GPU where there is one.")] = None,
    tensorboard: Annotated[
        bool, option("Write logs for TensorBoard to FOLDER/tensorboard.", "--tensorboard")
    ] = False,
    resume: Annotated[
        bool, option("Go on after the last complete epoch in FOLDER.", "--resume")
    ] = False,
    force: Annotated[bool, option("Replace another run in FOLDER.", "--force")] = False,
    as_json: Json = False,
    debug: Debug = False,
    grouping: Grouping,
    settings: dict[str, Any],
) -> None:
    """Train a pruned checkpoint; its pruned weights stay exactly zero.

    Defaults are the DIMAP paper's. For several GPUs: torchrun --nproc-per-node N -m dimap finetune …
    """

    def again() -> str:
        if not (out / STATE).exists():
            return ""
        epoch = json.loads((out / HISTORY).read_text(encoding="utf-8"))["epochs"][-1]["epoch"]
        held = f"the weights of epoch {epoch}" if epoch else "the weights before training"
        return f"{out} holds {held}; the same command with --resume goes on from there"

    with report_errors(debug, again):
        from ..finetuning import finetune as work

        if dense and (masks is not None or settings["masks_from_zeros"]):
            given = "--masks" if masks is not None else "--masks-from-zeros"
            raise ValueError(f"--dense holds nothing, so {given} must not be given with it")
        result = work(
            checkpoint,
            data,
            {} if dense else masks,
            out=out,
            teacher=teacher,
            device=device,
            tensorboard=tensorboard,
            resume=resume,
            force=force,
            **grouping,
            **settings,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(result.to_dict())
        return
    print_wrote(f"{result.best} (top-1 {result.best_top1:.2f} %, epoch {result.best_epoch})")
