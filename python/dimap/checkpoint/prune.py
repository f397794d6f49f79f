"""Prune a safetensors file, or a folder of them, into another without loading it: exactly.

`dimap._C` reads the weights to find the cuts, mostly once, and once more to write the output. Memory
does not grow with the checkpoint, nor with its largest tensor, and the result is bit by bit that of
`dimap.prune`. Here it is said which bytes are which layer, and where each goes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _C
from .._files import naming, replacing
from ..distributed.launch import group_of
from ..distributed.ranks import Ranks
from ..groups import AUX, Patterns
from ..groups.plan import Normalize, Plan, Scope
from ..report import Pruned
from . import open_checkpoint
from .base import INDEX, Progress, check_apart
from .bitmask import Layout, lay_out
from .engine import FILL, READ, Told, begin, elements, opened
from .folder import Shards, packed_index
from .header import DTYPES, Entry, Header, make_header

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Progress", "StreamPruning", "prune_checkpoint", "pruning_checkpoint"]

ENGINE_DTYPES = {"F32": 0, "BF16": 1, "F16": 2}  # as `_C` numbers them
ASIDE = 1 << 25  # numbers that may be set aside while the cuts are sought: 128 MiB


@dataclass(kw_only=True)
class StreamPruning(Pruned):
    """What was pruned: `dimap.Pruning` without the weights and masks, which lie in files.

    modules, thresholds, scope, normalize, sparsity: as in `dimap.Pruning`.
    shapes, dtypes: of every parameter, "aux" included; dtypes as torch names them, "float32".
    kept: how many weights the masks keep, of every pruned parameter.
    nonzero: how many are not zero in the output, of every parameter, "aux" included.
    smallest: the smallest kept magnitude of a layer, under each of its parameters; none where
        nothing is kept.
    readings: how often the weights were read to find the cuts.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    kept: dict[str, int] = field(default_factory=dict)
    nonzero: dict[str, int] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    readings: int = 1


def prune_checkpoint(
    source: str | os.PathLike[str] | Shards,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
    masks: str | os.PathLike[str] | None = None,
    bitmask: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> StreamPruning:
    """Prune a safetensors file or a Hugging Face folder of them into another.

    source: the path, or an open checkpoint. It is only read.
    target: a file for a file, a folder for a folder. It appears complete or not at all: the same
        headers, metadata, index and other files, with weights set to zero.
    sparsity, scope, normalize, patterns: as in `dimap.select`.
    masks: a file for the masks (see `dimap.load_masks`), one bit a weight.
    bitmask: write files of one bit a weight and the nonzero values (docs/format.md), which
        `dimap.load_file` and `dimap expand` read.
    force: replace outputs that are there already.
    group: several processes do it together, each its part of the bytes: all of them call this with
        the same arguments and see the same files. The first one creates the outputs and returns
        when they are there, as do the others.

    Raises ValueError for a checkpoint that is damaged, of no known family, or holds weights that
    are not finite or not float32, bfloat16 or float16; OSError where files cannot be read or
    written; FileExistsError where an output exists and not `force`. With a group: RuntimeError for an
    error in another rank, with its message, and ConnectionError for a rank that is gone.
    """
    with ExitStack() as stack:
        ranks = Ranks() if group is None else stack.enter_context(group_of(group))
        pruned = stack.enter_context(
            pruning_checkpoint(
                source,
                target,
                sparsity,
                scope=scope,
                normalize=normalize,
                patterns=patterns,
                masks=masks,
                bitmask=bitmask,
                force=force,
                progress=progress,
                ranks=ranks,
            )
        )
    return pruned


@contextmanager
def pruning_checkpoint(
    source: str | os.PathLike[str] | Shards,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
    masks: str | os.PathLike[str] | None = None,
    bitmask: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Iterator[StreamPruning]:
    """`prune_checkpoint`, but the outputs appear when the block ends, and not if it fails.

    ranks: those that do it together, where there are several; they leave the block together.
    """
    ranks = ranks or Ranks()
    first = ranks.rank == 0
    with ExitStack() as stack:
        checkpoint = source if isinstance(source, Shards) else open_checkpoint(source)
        if not isinstance(checkpoint, Shards):
            raise ValueError(f"a stream needs safetensors files, got {checkpoint.path}")
        if checkpoint.packed:
            raise ValueError(
                f"{checkpoint.path} must be dense, got a bitmask file: `dimap expand` makes it dense"
            )
        plan = Plan.of_shapes(checkpoint.shapes(), scope, normalize, patterns)
        keep = plan.keep(sparsity)
        for name in plan.names:
            dtype = checkpoint.tensors[name].dtype
            if dtype.code not in ENGINE_DTYPES:
                raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype.name}")
        ratios = plan.ratios(sparsity)
        settings = (scope, normalize, ratios, masks is None, bitmask)
        check_agreement(checkpoint, plan, keep, settings, ranks)

        # The first rank creates the outputs; all fill them.
        made: tuple[list[Path], Path | None] | None = None
        if first:
            packed = None
            if masks is not None:
                apart = {"IN": Path(checkpoint.path), "OUT": Path(target)}
                check_apart("masks", Path(masks), apart)
                packed = stack.enter_context(replacing(Path(masks), force=force)).absolute()
            created = stack.enter_context(checkpoint.creating(target, force=force))
            made = [file.absolute() for file in created], packed
        ranks.outputs(*(Path(path) for path in (target, masks) if path is not None))
        stack.enter_context(ranks.stopping_together())  # inside of what removes the outputs
        made = ranks.gather(made)[0]
        assert made is not None

        names = [p for layers in plan.modules.values() for x in layers for p in x.parameters]
        result = StreamPruning(
            modules=plan.modules,
            thresholds={},
            scope=scope,
            normalize=normalize,
            sparsity=ratios,
            shapes={name: checkpoint.tensors[name].shape for name in names},
            dtypes={name: checkpoint.tensors[name].dtype.name for name in names},
        )
        told = Told(progress if first else None)
        files, masks_file = made
        layouts = _fill(checkpoint, plan, keep, files, masks_file, bitmask, result, told, ranks)
        if first and bitmask and checkpoint.index is not None:
            index = files[0].with_name(INDEX)
            index.unlink()  # a copy, which may be read-only like the original
            headers = {
                s.path.name: x.header for s, x in zip(checkpoint.shards, layouts, strict=True)
            }
            index.write_text(packed_index(checkpoint.index, headers), encoding="utf-8")
        yield result
        ranks.gather(None)  # nothing is renamed before all ranks are here


def check_agreement(
    checkpoint: Shards, plan: Plan, keep: Sequence[int], settings: object, ranks: Ranks
) -> None:
    """All ranks do the same job, or none does."""
    words = (plan.names, plan.layers, plan.scopes, keep, settings)
    digest = hashlib.sha256(repr(words).encode())
    for shard in checkpoint.shards:
        digest.update(shard.path.name.encode() + b"\0" + shard.header.raw)
    found = ranks.gather(digest.hexdigest())
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                "all ranks must be given the same checkpoint and settings, "
                f"got others on rank {rank} than on rank 0"
            )


def _fill(
    checkpoint: Shards,
    plan: Plan,
    keep: Sequence[int],
    targets: Sequence[Path],
    masks: Path | None,
    bitmask: bool,
    result: StreamPruning,
    told: Told,
    ranks: Ranks,
) -> list[Layout]:
    """Decide and write this rank's part, and complete the result with the counts of all ranks."""
    shards = checkpoint.shards
    located = {e.name: (file, e) for file, shard in enumerate(shards) for e in shard.header.entries}
    tensors = [located[name] for name in plan.names]
    pruned = set(plan.names)
    others = [where for name, where in located.items() if name not in pruned]  # alike on all ranks
    module_of = dict(zip(plan.layers, plan.scopes, strict=True))
    with ExitStack() as files:
        sources = files.enter_context(opened([shard.path for shard in shards], READ))
        engine = _C.Pruning(
            sources,
            [
                (file, e.begin, e.numel(), ENGINE_DTYPES[e.dtype.code], layer)
                for (file, e), layer in zip(tensors, plan.layers, strict=True)
            ],
            [module_of[layer] for layer in range(len(module_of))],
            keep,
            rank=ranks.rank,
            size=ranks.size,
            exchange=ranks.exchange if ranks.size > 1 else None,
            progress=told,
            aside=ASIDE,
        )
        try:
            engine.decide()
            packed = dict(zip(plan.names, engine.count_packed(), strict=True)) if bitmask else {}
            layouts = [
                _layout(s.header, packed, str(s.path)) if bitmask else s.layout for s in shards
            ]
            outputs = files.enter_context(opened(targets, FILL))
            for output, layout in zip(outputs, layouts, strict=True):
                begin(output, layout.header, first=ranks.rank == 0)
            masks_at = None
            if masks is not None:
                (output,) = files.enter_context(opened([masks], FILL))
                header = _masks_header(plan, result)
                begin(output, header, first=ranks.rank == 0)
                begins = {entry.name: entry.begin for entry in header.entries}
                masks_at = (*output, [begins[name] for name in plan.names])
                outputs = [*outputs, output]
            nonzero_others = engine.write(
                outputs[: len(targets)],
                [place_of(layouts[file], entry) for file, entry in tensors],
                [
                    (file, *elements(e), layouts[file].places[e.name].values.begin)
                    for file, e in others
                ],
                masks=masks_at,
            )
        except _C.NonFiniteError as error:
            number, index, kind = error.args
            raise ValueError(
                f"{plan.names[number]} must be finite, got {kind} at flat index {index}"
            ) from error
        except _C.ChangedError as error:
            file, entry = tensors[error.args[0]]
            raise ValueError(
                f"{shards[file].path}: {entry.name} must not change while it is read"
            ) from error
        told.finish()
        if ranks.rank > 0:  # what rank 0 brings to the disk need not be what others wrote
            for descriptor, path in outputs:
                with naming(Path(path)):
                    os.fsync(descriptor)
    _add_up(engine, plan, keep, others, nonzero_others, result, ranks)
    return layouts


def _layout(dense: Header, packed: Mapping[str, int], where: str) -> Layout:
    return lay_out(
        dense, {e.name: packed[e.name] for e in dense.entries if e.name in packed}, where
    )


def place_of(layout: Layout, entry: Entry) -> tuple[int, int]:
    """Where the weights, or the values and the bits, of a tensor go in its output."""
    place = layout.places[entry.name]
    return place.values.begin, -1 if place.bits is None else place.bits.begin


def _masks_header(plan: Plan, result: StreamPruning) -> Header:
    """The header of the file that `dimap.save_masks` would write."""
    shapes = {name: list(result.shapes[name]) for name in plan.names}
    settings = result.mask_metadata() | {"dimap_masks": "1", "shapes": json.dumps(shapes)}
    sizes = zip(plan.names, plan.sizes, strict=True)
    described = [(name, DTYPES["U8"], [(size + 7) // 8]) for name, size in sizes]
    return make_header(described, settings, "the file of masks")


def _add_up(
    engine: _C.Pruning,
    plan: Plan,
    keep: Sequence[int],
    others: Sequence[tuple[int, Entry]],
    nonzero_others: Sequence[int],
    result: StreamPruning,
    ranks: Ranks,
) -> None:
    """Complete the result, once it is sure that exactly what was asked for is kept."""
    result.readings = engine.readings
    result.thresholds = dict(zip(plan.scope_names, engine.thresholds, strict=True))
    result.kept = dict(zip(plan.names, engine.kept, strict=True))
    kept = [0] * len(keep)
    for scope, count in zip(plan.scopes, engine.kept, strict=True):
        kept[scope] += count
    for name, want, got in zip(plan.scope_names, keep, kept, strict=True):
        if want != got:
            raise ValueError(f"{name} must keep {want} weights, got {got}")
    parts = ranks.gather((engine.nonzero, list(nonzero_others), engine.smallest))
    nonzero = dict(zip(plan.names, map(sum, zip(*(p[0] for p in parts), strict=True)), strict=True))
    for (_, entry), counts in zip(others, zip(*(p[1] for p in parts), strict=True), strict=True):
        nonzero[entry.name] = sum(counts) if entry.dtype.size else entry.numel()
    result.nonzero = {name: nonzero[name] for name in result.shapes}
    least = {
        name: min((v for v in values if not math.isnan(v)), default=math.nan)
        for name, values in zip(plan.names, zip(*(p[2] for p in parts), strict=True), strict=True)
    }
    for layer in (x for module, layers in plan.modules.items() if module != AUX for x in layers):
        found = [least[p] for p in layer.parameters if not math.isnan(least[p])]
        if found:
            result.smallest.update(dict.fromkeys(layer.parameters, min(found)))
