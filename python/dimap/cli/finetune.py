"""`dimap finetune`: the options of `Settings` and where things are."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .._support import IN_HELP, Debug, Json, clear_errors, print_json
from ..finetuning.settings import Settings


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `Settings`, beside its own parameters."""
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, field in Settings.model_fields.items():
        extra: Any = field.json_schema_extra
        details: dict[str, Any] = {"help": field.description, "rich_help_panel": extra["panel"]}
        kind: Any = field.annotation
        if name in ("mean", "std"):
            kind = str | None
            details |= {"parser": _numbers, "metavar": "N,N,N"}
        option = typer.Option(**details)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[kind, option],
            )
        )

    def run(**arguments: Any) -> None:
        command(**arguments)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@_with_settings
def finetune(
    *,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help=f"{IN_HELP}", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A folder with train/ and val/, or a data set of timm's factory with its folder, "
            "as in torch/fashion_mnist:FOLDER. Nothing is downloaded.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")],
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Masks to hold; the zeros of CHECKPOINT's prunable weights if not given.",
        ),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Hold nothing.")] = False,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="A dense model whose outputs are learned too."),
    ] = None,
    timm_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="timm's name for the model, if CHECKPOINT lacks it."),
    ] = None,
    train_split: Annotated[str, typer.Option(help="The split for training.")] = "train",
    val_split: Annotated[str, typer.Option(help="The split for validation.")] = "validation",
    class_map: Annotated[
        str | None, typer.Option(metavar="FILE", help="Class names to numbers, as timm has it.")
    ] = None,
    reset_head: Annotated[
        bool, typer.Option("--reset-head", help="A new classifier, of as many classes as DATA.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda, cpu, …; a GPU where there is one.")
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write logs for TensorBoard to FOLDER/tensorboard."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last complete epoch in FOLDER.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another run in FOLDER.")] = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a pruned checkpoint; its pruned weights stay exactly zero.

    Defaults are the DIMAP paper's. For several GPUs: torchrun --nproc-per-node N -m dimap finetune …
    """
    with clear_errors(debug):
        from ..finetuning import finetune as work

        if dense and masks is not None:
            raise ValueError("--dense holds nothing, so --masks must not be given with it")
        if options["auto_augment"] == "none":
            options["auto_augment"] = None
        result = work(
            checkpoint,
            data,
            {} if dense else masks,
            out=out,
            teacher=teacher,
            timm_model=timm_model,
            train_split=train_split,
            val_split=val_split,
            class_map=class_map,
            reset_head=reset_head,
            device=device,
            tensorboard=tensorboard,
            resume=resume,
            force=force,
            **options,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(result.to_dict())
        return
    text = Text("wrote ", style="green").append(
        f"{result.best} (top-1 {result.best_top1:.2f} %, epoch {result.best_epoch})",
        style="default",
    )
    Console().print(text, soft_wrap=True)
