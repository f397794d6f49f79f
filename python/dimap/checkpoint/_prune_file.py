"""Prune one checkpoint into another: the work of `dimap prune`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _timm
from .._files import replacing
from ..distributed.ranks import Ranks
from ..groups import AUX, wholes
from ..groups.plan import Normalize, Scope
from ..plots import report_output
from ..report import Report, build_report
from .base import Checkpoint, Progress, Silent, check_apart
from .folder import Shards
from .prune import pruning_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from ..pruning import Pruning
    from .memory import StateDict
    from .prune import StreamPruning


def prune_file(
    checkpoint: Checkpoint,
    out: Path,
    sparsity: float | None,
    shares: Mapping[str, float],
    *,
    scope: Scope,
    normalize: Normalize,
    masks: Path | None,
    report: Path | None,
    bitmask: bool,
    force: bool,
    timm_model: str | None,
    input_size: tuple[int, ...] | None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Write the pruned checkpoint to `out`, with its masks and report where they are wanted.

    sparsity, shares: the share of weights to drop, and other shares for modules by name.
    bitmask: write one bit a weight and the nonzero values (docs/format.md).
    timm_model: timm's name for the model, to count FLOPs, where the checkpoint does not say it.
    ranks: the processes that do it together; the report, and FLOPs, are the first one's.

    All outputs appear complete or not at all.
    """
    ranks, told = ranks or Ranks(), progress or Silent()
    in_files = isinstance(checkpoint, Shards)
    if ranks.size > 1 and not in_files:
        raise ValueError(
            f"IN must be safetensors to be shared among {ranks.size} ranks, got {checkpoint.path}"
        )
    modules = checkpoint.find_modules()
    ratios = _ratios(sparsity, shares, [name for name in modules if name != AUX])
    others = {"IN": Path(checkpoint.path), "OUT": out}
    for option, path in (("--masks", masks), ("--report", report)):
        if path is not None:
            check_apart(option, path, others)
            others[option] = path
    if bitmask and not in_files and out.suffix != ".safetensors":
        raise ValueError(f"the output must end in .safetensors with --format bitmask, got {out}")
    names = wholes(p for layers in modules.values() for layer in layers for p in layer.parameters)
    with ExitStack() as outputs:
        # Begun before the work, so that an output that cannot be written is told at once. What is
        # begun last is completed first: OUT before the small files.
        reported = None
        if report is not None:
            ranks.outputs(report)
            if ranks.rank == 0:
                reported = outputs.enter_context(report_output(report, modules, force=force))
                reported.before(checkpoint)
        pruning: Pruning | StreamPruning
        if isinstance(checkpoint, Shards):
            pruning = outputs.enter_context(
                pruning_checkpoint(
                    checkpoint,
                    out,
                    ratios,
                    scope=scope,
                    normalize=normalize,
                    masks=masks,
                    bitmask=bitmask,
                    force=force,
                    progress=progress,
                    ranks=ranks,
                )
            )
        else:
            from ..pruning import prune

            held: StateDict = checkpoint  # type: ignore[assignment]  # the only other kind
            masks_file = masks and outputs.enter_context(replacing(masks, force=force))
            (file,) = outputs.enter_context(held.creating(out, force=force))
            told.step("pruning")
            state = {name: held.get(name) for name in names}
            pruning = prune(
                state, ratios, scope=scope, normalize=normalize, patterns=checkpoint.choice
            )
            told.step("writing")
            held.save(file, out.suffix, pack=pruning.masks if bitmask else ())
            if masks_file:
                pruning.save_masks(masks_file)
        told.step("counting")
        model, why = None, "the first rank counts them"
        if ranks.rank == 0:
            model, why = _model(checkpoint, names, timm_model)
        built = build_report(pruning, model, input_size)
        notes = built.notes if model else (f"no FLOPs: {why}", *pruning.grouping_notes)
        built = replace(built, notes=(*notes, *checkpoint.notes))
        if reported:
            reported.write(built, pruning)
        told.step("completing")
    return built


def _ratios(
    sparsity: float | None, shares: Mapping[str, float], modules: list[str]
) -> float | dict[str, float]:
    if not shares and sparsity is not None:
        return sparsity
    for name in shares:
        if name not in modules:
            raise ValueError(f"--module must name one of {', '.join(modules)}, got {name}")
    ratios = {name: shares.get(name, sparsity) for name in modules}
    given = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if missing := [name for name in modules if name not in given]:
        raise ValueError(f"--sparsity, or --module for each of {', '.join(missing)}, must be given")
    return given


def _model(
    checkpoint: Checkpoint, names: list[str], timm_model: str | None
) -> tuple[nn.Module | None, str]:
    """The model for counting FLOPs, pruned or only its shapes, or the reason why there is none."""
    described = (
        (timm_model, {}) if timm_model else _timm.described(checkpoint.path, checkpoint.metadata)
    )
    if described is None:
        return None, "IN does not say which timm model it is; --timm-model NAME says it"
    in_files = isinstance(checkpoint, Shards)  # names and shapes are enough
    state = {n: checkpoint.tensors[n].meta() if in_files else checkpoint.get(n) for n in names}
    try:
        return _timm.with_weights(*described, state), ""
    except (ValueError, ModuleNotFoundError) as error:
        if timm_model:
            raise
        return None, str(error)
