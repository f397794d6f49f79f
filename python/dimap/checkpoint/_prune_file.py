"""Prune one checkpoint into another: the work of `dimap prune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from .. import _timm
from .._files import replacing
from .._progress import Bar
from ..distributed.ranks import Ranks
from ..groups import AUX, Layer, find_modules
from ..plots import report_output
from ..pruning import Normalize, Pruning, Scope, prune
from ..report import Report, build_report
from ..stream import StreamPruning, pruning_checkpoint
from . import Checkpoint
from ._safetensors import Shards


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
    bar: Bar,
    ranks: Ranks | None = None,
) -> Report:
    """Write the pruned checkpoint to `out`, with its masks and report where they are wanted.

    sparsity, shares: the share of weights to drop, and other shares for modules by name.
    bitmask: write one bit a weight and the nonzero values (docs/format.md).
    timm_model: timm's name for the model, to count FLOPs, where the checkpoint does not say it.
    ranks: the processes that do it together; the report, and FLOPs, are the first one's.

    All outputs appear complete or not at all.
    """
    ranks = ranks or Ranks()
    if ranks.size > 1 and not isinstance(checkpoint, Shards):
        raise ValueError(
            f"IN must be safetensors to be shared among {ranks.size} ranks, got {checkpoint.path}"
        )
    modules = find_modules(checkpoint.tensors)
    ratios = _ratios(sparsity, shares, [name for name in modules if name != AUX])
    _check_apart(checkpoint.path, out, masks, report)
    if bitmask and not isinstance(checkpoint, Shards) and out.suffix != ".safetensors":
        raise ValueError(f"the output must end in .safetensors with --format bitmask, got {out}")
    with ExitStack() as outputs:
        # Begun before the work, so that an output that cannot be written is told at once. What is
        # begun last is completed first: OUT before the small files.
        told = None
        if report is not None:
            ranks.outputs(report)
            if ranks.rank == 0:
                told = outputs.enter_context(report_output(report, modules, force=force))
                told.before(checkpoint)
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
                    progress=bar,
                    ranks=ranks,
                )
            )
            state = checkpoint.tensors
        else:
            masks_file = masks and outputs.enter_context(replacing(masks, force=force))
            writer = outputs.enter_context(checkpoint.create(out, force=force))
            bar.step("pruning")
            state = {name: checkpoint.get(name) for name in _parameters(modules)}
            pruning = prune(state, ratios, scope=scope, normalize=normalize)
            writer.pack = frozenset(pruning.masks if bitmask else ())
            sizes = {name: checkpoint.tensors[name].nbytes for name in writer.names}
            for name in bar.over("writing", sizes):
                writer.put(name, state[name] if name in state else checkpoint.get(name))
            if masks_file:
                pruning.save_masks(masks_file)
        bar.step("counting")
        found = {name: state[name] for name in _parameters(modules)}
        model, why = None, "the first rank counts them"
        if ranks.rank == 0:
            model, why = _model(checkpoint, found, timm_model)
        built = build_report(pruning, model, input_size)
        notes = built.notes if model else (f"no FLOPs: {why}",)
        built = replace(built, notes=(*notes, *checkpoint.notes))
        if told:
            told.write(built, pruning)
        bar.step("completing")
    return built


def _parameters(modules: Mapping[str, Sequence[Layer]]) -> list[str]:
    return [p for layers in modules.values() for layer in layers for p in layer.parameters]


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


def _check_apart(source: str, out: Path, masks: Path | None, report: Path | None) -> None:
    """No output may be the input or another output, or lie in a folder that is one of them."""
    taken = {Path(source).resolve(): "IN", out.resolve(): "OUT"}
    for option, path in (("--masks", masks), ("--report", report)):
        if path is None:
            continue
        place = path.resolve()
        for other, name in taken.items():
            if place == other or other in place.parents:
                raise ValueError(f"{option} must lie apart from {name}, got {path}")
        taken[place] = option


def _model(
    checkpoint: Checkpoint, state: dict[str, Tensor], timm_model: str | None
) -> tuple[nn.Module | None, str]:
    """The pruned model for counting FLOPs, or the reason why there is none."""
    if timm_model is not None:
        return _timm.with_weights(timm_model, {}, state), ""
    described = _timm.described(checkpoint.path, checkpoint.metadata)
    if described is None:
        return None, "IN does not say which timm model it is; --timm-model NAME says it"
    try:
        return _timm.with_weights(*described, state), ""
    except (ValueError, ModuleNotFoundError) as error:
        return None, str(error)
