"""`dimap finetune`: the options of `Settings` and where things are."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..finetuning.settings import STATE, Settings
from .common import IN_HELP, Debug, Json, print_json, print_wrote, report_errors
from .grouping import Grouping, grouped


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of `Settings`, or for those named, beside its own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
        for name in names or Settings.model_fields:
            field = Settings.model_fields[name]
            details: dict[str, Any] = {"help": field.description}
            details["rich_help_panel"] = field.json_schema_extra["panel"]  # type: ignore[index]
            kind: Any = field.annotation
            if name in ("mean", "std"):
                kind = str | None
                details |= {"parser": _numbers, "metavar": "N,N,N"}
            option = Annotated[kind, typer.Option(**details)]
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=option
                )
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


@with_settings()
@grouped
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
            help="The masks to hold. Without them the zeros of CHECKPOINT are held.",
        ),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Hold nothing.")] = False,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="A dense model whose outputs are learned too."),
    ] = None,
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
    grouping: Grouping,
    **options: Any,
) -> None:
    """Train a pruned checkpoint; its pruned weights stay exactly zero.

    Defaults are the DIMAP paper's. For several GPUs: torchrun --nproc-per-node N -m dimap finetune …
    """

    def again() -> str:
        done = (out / STATE).exists()
        return (
            "the same command with --resume goes on after the last complete epoch" if done else ""
        )

    with report_errors(debug, again):
        from ..finetuning import finetune as work

        if dense and (masks is not None or options["masks_from_zeros"]):
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
            **options,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(result.to_dict())
        return
    print_wrote(f"{result.best} (top-1 {result.best_top1:.2f} %, epoch {result.best_epoch})")
