"""Prune a checkpoint into another: exactly, and safetensors without loading them.

`dimap._C` reads the weights to find the cuts, mostly once, and once more to write the output. Memory
does not grow with the checkpoint, nor with its largest tensor, and the result is bit by bit that of
`dimap.prune`. Here it is said which bytes are which layer, and where each goes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .. import _C, _timm
from .._files import SUFFIX, naming, replacing
from ..distributed.launch import group_of
from ..distributed.ranks import Ranks
from ..groups import AUX, Choice, Patterns, Slice, choose, part_shape, whole, wholes
from ..groups.plan import Normalize, Plan, Scope, check_choice
from ..methods import METHODS
from ..plots import report_output
from ..report import Pruned, Report, build_report
from . import HUB, open_checkpoint
from .base import Checkpoint, Progress, Silent, check_apart
from .bitmask import Layout, lay_out
from .card import add_card_section
from .header import DTYPES, Entry, Header, make_header
from .native import FILL, READ, Told, begin, elements, opened
from .shards import Shards, packed_index

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from .state_dict import StateDict

__all__ = ["Progress", "StreamPruning", "prune_checkpoint", "pruning_checkpoint"]

ENGINE_DTYPES = {"F32": 0, "BF16": 1, "F16": 2}  # as `_C` numbers them
ASIDE = 1 << 25  # numbers that may be set aside while the cuts are sought: 128 MiB

P = ParamSpec("P")
T = TypeVar("T")


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
    notes: what the user should know of the checkpoint and of copies of its weights.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    kept: dict[str, int] = field(default_factory=dict)
    nonzero: dict[str, int] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    readings: int = 1
    notes: list[str] = field(default_factory=list)
    summarize: Callable[[], Report] | None = field(default=None, repr=False, compare=False)

    def summary(self) -> Report:
        """The report with the checkpoint's notes, and FLOPs where it says which timm model it is."""
        return self.summarize() if self.summarize else self.report()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"summarize": None}  # which holds the checkpoint


@contextmanager
def pruning_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float] | None = None,
    *,
    shares: Mapping[str, float] | None = None,
    method: str = "dimap",
    scope: Scope | None = None,
    normalize: Normalize | None = None,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    bitmask: bool = False,
    key: str | None = None,
    all_copies: bool = False,
    random_init: bool = False,
    timm_model: str | None = None,
    input_size: Sequence[int] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | Ranks | None = None,
) -> Iterator[StreamPruning]:
    """Prune a checkpoint into another, exactly as `dimap.prune` does it with the loaded weights.

    `prune_checkpoint` is a function, which returns when the outputs are there; `pruning_checkpoint` a
    block, at whose end they appear, unless it fails.

    source: what `open_checkpoint` takes, with `key` and `random_init`, or what it gave. It is only
        read. Safetensors stream by; files of torch.save and timm models are pruned in memory.
    target: a file for a file, a folder for a folder. It appears complete or not at all: the same
        headers, metadata, index and other files, with weights set to zero.
    sparsity, scope, normalize, patterns, family, ignore: as in `dimap.select`. shares: other
        sparsities of single modules, by name.
    method: "dimap", "lamp", "uniform" or "global_magnitude": the scope and normalization where these
        are not given.
    masks: a file for the masks (see `dimap.load_masks`), one bit a weight.
    report: a file that ends in .json for the report; or a folder for it, pictures and a page.
    bitmask: write files of one bit a weight and the nonzero values (docs/format.md), which
        `dimap.load_file` and `dimap expand` read.
    all_copies: give other copies of the weights the same masks: a teacher's beside them in a file,
        earlier checkpoints in a folder.
    timm_model, input_size: for counting FLOPs: timm's name of the model, where the checkpoint does
        not say it, and the size of its input, where that is not timm's.
    force: replace outputs that are there already.
    group: several processes do it together, each its part of the bytes: all of them call this with
        the same arguments and see the same files. The first one creates the outputs and returns
        when they are there, as do the others.

    Returns what was done, in counts; the weights were not loaded, where they streamed by.

    Raises ValueError for a checkpoint that is damaged, of no known family, or holds weights that
    are not finite or not float32, bfloat16 or float16; OSError where files cannot be read or
    written; FileExistsError where an output exists and not `force`. With a group: RuntimeError for an
    error in another rank, with its message, and ConnectionError for a rank that is gone.
    """
    with ExitStack() as stack:
        ranks = group if isinstance(group, Ranks) else Ranks()
        if group is not None and not isinstance(group, Ranks):
            ranks = stack.enter_context(group_of(group))
        first = ranks.rank == 0
        checkpoint = (
            source
            if isinstance(source, Checkpoint)
            else open_checkpoint(source, key=key, all_copies=all_copies, random_init=random_init)
        )
        out = Path(target)

        # Which weights, and how many of them are kept.
        check_choice("method", method, [n for n, m in METHODS.items() if not m.needs_data])
        scope = scope or METHODS[method].scope
        normalize = normalize or METHODS[method].normalize
        checkpoint.choice = choose(patterns, family, ignore) or checkpoint.choice
        shapes = checkpoint.shapes()
        plan = Plan.of_shapes(shapes, scope, normalize, checkpoint.choice, checkpoint.ties())
        given = _join(sparsity, shares or {}, [name for name in plan.modules if name != AUX])
        keep, ratios = plan.keep(given), plan.ratios(given)
        _check(checkpoint, plan, out, bitmask, masks is not None, ranks)
        stream = None
        if isinstance(checkpoint, Shards):
            stream = _Stream(checkpoint, plan, keep, bitmask, ranks)
            settings = (keep, ratios, scope, normalize, masks is None, bitmask)
            check_agreement(checkpoint, plan, settings, ranks)
        parts = [p for layers in plan.modules.values() for x in layers for p in x.parameters]
        names = wholes(parts)
        parts = list(dict.fromkeys([*names, *parts]))
        result = StreamPruning(
            modules=plan.modules,
            thresholds={},
            scope=scope,
            normalize=normalize,
            sparsity=ratios,
            shapes={name: part_shape(shapes, name) for name in parts},
            dtypes={name: checkpoint.tensors[whole(name)].dtype.name for name in parts},
            grouping_notes=plan.notes,
        )

        # The first rank creates the outputs, before the work, so that one that cannot be written is
        # told at once. What is begun last is completed first: OUT before the small files.
        places = {"OUT": out}
        if checkpoint.place is not None:
            places = {"IN": checkpoint.place, "OUT": out}
        for kind, path in (("masks", masks), ("report", report)):
            if path is not None:
                check_apart(kind, Path(path), places)
                places[kind] = Path(path)
        ranks.outputs(*(path for kind, path in places.items() if kind != "IN"))
        reported = None
        made: tuple[list[Path], Path | None] | None = None
        if first:
            if report is not None:
                output = report_output(Path(report), plan.modules, force=force)
                reported = stack.enter_context(output)
                reported.before(checkpoint)
            packed = None
            if masks is not None:
                packed = stack.enter_context(replacing(Path(masks), force=force)).absolute()
            created = stack.enter_context(checkpoint.creating(out, force=force))
            if packed is None and all_copies and checkpoint.others:
                packed = created[0].with_name(f".masks{SUFFIX}").absolute()
                packed.touch()
            made = [file.absolute() for file in created], packed
        stack.enter_context(ranks.stopping_together())  # inside of what removes the outputs
        made = ranks.gather(made)[0]
        assert made is not None
        files, packed = made
        if packed is not None and masks is not None:
            stack.enter_context(naming(Path(masks), packed))
        home = files[0].parent if checkpoint.is_folder else files[0]
        stack.enter_context(naming(out, home))

        # The work. All ranks fill the files.
        progress = progress if progress is not None and first else Silent()
        if stream is not None:
            stream.fill(files, packed, result, Told(progress))
        else:
            held: StateDict = checkpoint  # type: ignore[assignment]  # the only other kind
            ending = out.suffix.lower()
            _prune_state(held, given, files, ending, packed, bitmask, result, progress)
        result.notes += checkpoint.notes
        if first and all_copies and checkpoint.others and packed is not None:
            from .copies import mask_others

            result.notes += mask_others(checkpoint, home, packed)
            if masks is None:
                packed.unlink()

        # What was done.
        def summarize() -> Report:
            model, why = None, "the first rank counts them"
            if first:
                model, why = _model(checkpoint, names, timm_model)
            built = build_report(result, model, input_size)
            lacking = built.notes if model else (f"no FLOPs: {why}", *plan.notes)
            return replace(built, notes=(*lacking, *result.notes))

        result.summarize = cache(summarize)
        if timm_model or input_size:
            result.summary()  # an error in it leaves no outputs
        if reported is not None and report is not None:
            with naming(Path(report)):
                reported.write(result.summary(), result)
        if first and checkpoint.path.startswith(HUB):
            add_card_section(home, build_report(result), checkpoint.path)
        yield result
        ranks.gather(None)  # nothing is renamed before all ranks are here


def _completed(block: Callable[P, AbstractContextManager[T]], name: str) -> Callable[P, T]:
    """The function of that name that runs a block with nothing in it."""

    @wraps(block)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with block(*args, **kwargs) as result:
            pass
        return result

    run.__name__ = run.__qualname__ = name
    return run


prune_checkpoint = _completed(pruning_checkpoint, "prune_checkpoint")


def _join(
    sparsity: float | Mapping[str, float] | None,
    shares: Mapping[str, float],
    modules: Sequence[str],
) -> float | Mapping[str, float]:
    """One sparsity, or one for each of the modules."""
    if sparsity is not None and not shares:
        return sparsity
    named: dict[str, float] = {}
    # "qkv" is the module of every tower; "text.qkv" says more of one.
    for name, share in sorted(shares.items(), key=lambda item: item[0] in modules):
        here = [name] if name in modules else [m for m in modules if m.endswith(f".{name}")]
        if not here:
            raise ValueError(f"--module must name one of {', '.join(modules)}, got {name}")
        named |= dict.fromkeys(here, share)
    given = dict(sparsity) if isinstance(sparsity, Mapping) else {}
    if sparsity is not None and not isinstance(sparsity, Mapping):
        given = dict.fromkeys(modules, sparsity)
    given |= named
    if missing := [name for name in modules if name not in given]:
        raise ValueError(f"--sparsity, or --module for each of {', '.join(missing)}, must be given")
    return given


def _check(
    checkpoint: Checkpoint, plan: Plan, out: Path, bitmask: bool, masks: bool, ranks: Ranks
) -> None:
    """Refuse what cannot be pruned, or not be written as it is asked for."""
    if isinstance(checkpoint, Shards):
        if checkpoint.packed:
            raise ValueError(
                f"{checkpoint.path} must be dense, got a bitmask file: `dimap expand` makes it dense"
            )
    elif ranks.size > 1:
        raise ValueError(
            f"IN must be safetensors to be shared among {ranks.size} ranks, got {checkpoint.path}"
        )
    elif bitmask and (checkpoint.is_folder or out.suffix.lower() != ".safetensors"):
        raise ValueError(f"the output must end in .safetensors with --format bitmask, got {out}")
    for name in wholes(plan.names):
        dtype = checkpoint.tensors[name].dtype
        if dtype.code not in ENGINE_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype.name}")
    if not isinstance(checkpoint, Shards) or not (bitmask or masks):
        return
    for name, size in zip(plan.names, plan.sizes, strict=True):
        if isinstance(name, Slice) and size % 8:  # each begins with a byte of its own
            raise ValueError(
                f"{name} must have a multiple of 8 weights for masks or a bitmask file to be "
                f"streamed, got {size}: leave --masks and --format bitmask out"
            )


def check_agreement(shards: Shards, plan: Plan, settings: object, ranks: Ranks) -> None:
    """All ranks do the same job, or none does."""
    digest = hashlib.sha256(repr((plan.names, plan.layers, plan.scopes, settings)).encode())
    for shard in shards.shards:
        digest.update(shard.path.name.encode() + b"\0" + shard.header.raw)
    found = ranks.gather(digest.hexdigest())
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                "all ranks must be given the same checkpoint and settings, "
                f"got others on rank {rank} than on rank 0"
            )


def place_of(layout: Layout, entry: Entry, before: int = 0) -> tuple[int, int]:
    """Where the weights, or the values and the bits, of a tensor go in its output.

    before: values of the same parameter that stand before those of this slice of it.
    """
    place = layout.places[whole(entry.name)]
    size, count = entry.dtype.size, entry.numel()
    if place.bits is None:
        at = entry.name.at if isinstance(entry.name, Slice) else 0
        return place.values.begin + at * count * size, -1
    return place.values.begin + before * size, place.bits.begin + _skipped(entry.name, count)


def _skipped(name: str, size: int) -> int:
    """Bytes of bits in front of a slice's, of `size` weights."""
    return name.at * size // 8 if isinstance(name, Slice) else 0


class _Stream:
    """One pruning from files to files, by one rank or by several."""

    def __init__(
        self, checkpoint: Shards, plan: Plan, keep: list[int], bitmask: bool, ranks: Ranks
    ) -> None:
        self.checkpoint, self.plan, self.keep = checkpoint, plan, keep
        self.bitmask, self.ranks = bitmask, ranks
        self.shards = checkpoint.shards
        located = {
            e.name: (file, e) for file, s in enumerate(self.shards) for e in s.header.entries
        }
        self.tensors = [(located[whole(n)][0], located[whole(n)][1].part(n)) for n in plan.names]
        for name in wholes(plan.names):
            del located[name]
        self.others = list(located.values())  # alike on all ranks
        self.before = [0] * len(
            plan.names
        )  # of each tensor: values of its parameter before its own

    def fill(
        self, targets: list[Path], masks: Path | None, result: StreamPruning, told: Told
    ) -> None:
        """Decide and write this rank's part, and complete the result with the counts of all ranks."""
        plan, ranks = self.plan, self.ranks
        module_of = dict(zip(plan.layers, plan.scopes, strict=True))
        with ExitStack() as files:
            engine = _C.Pruning(
                files.enter_context(opened(self.checkpoint.files, READ)),
                [
                    (file, e.begin, e.numel(), ENGINE_DTYPES[e.dtype.code], layer)
                    for (file, e), layer in zip(self.tensors, plan.layers, strict=True)
                ],
                [module_of[layer] for layer in range(len(module_of))],
                self.keep,
                rank=ranks.rank,
                size=ranks.size,
                exchange=ranks.exchange if ranks.size > 1 else None,
                progress=told,
                aside=ASIDE,
            )
            try:
                engine.decide()
                layouts = self._lay_out(engine)
                outputs = files.enter_context(opened(targets, FILL))
                for output, layout in zip(outputs, layouts, strict=True):
                    begin(output, layout.header, first=ranks.rank == 0)
                masks_at = None
                if masks is not None:
                    (output,) = files.enter_context(opened([masks], FILL))
                    header = _masks_header(plan, result)
                    begin(output, header, first=ranks.rank == 0)
                    begins = {entry.name: entry.begin for entry in header.entries}
                    sizes = zip(plan.names, plan.sizes, strict=True)
                    masks_at = (
                        *output,
                        [begins[whole(n)] + _skipped(n, size) for n, size in sizes],
                    )
                    outputs = [*outputs, output]
                nonzero_others = engine.write(
                    outputs[: len(targets)],
                    [
                        place_of(layouts[file], entry, before)
                        for (file, entry), before in zip(self.tensors, self.before, strict=True)
                    ],
                    [
                        (file, *elements(e), layouts[file].places[e.name].values.begin)
                        for file, e in self.others
                    ],
                    masks=masks_at,
                )
            except _C.NonFiniteError as error:
                number, index, kind = error.args
                raise ValueError(
                    f"{plan.names[number]} must be finite, got {kind} at flat index {index}"
                ) from error
            except _C.ChangedError as error:
                file, entry = self.tensors[error.args[0]]
                raise ValueError(
                    f"{self.shards[file].path}: {entry.name} must not change while it is read"
                ) from error
            told.finish()
            if ranks.rank > 0:  # what rank 0 brings to the disk need not be what others wrote
                for descriptor, path in outputs:
                    with naming(Path(path)):
                        os.fsync(descriptor)
        self._add_up(engine, nonzero_others, result)
        if self.bitmask and self.checkpoint.index is not None and ranks.rank == 0:
            headers = {s.path.name: x.header for s, x in zip(self.shards, layouts, strict=True)}
            self.checkpoint.write_index(targets, packed_index(self.checkpoint.index, headers))

    def _lay_out(self, engine: _C.Pruning) -> list[Layout]:
        """What goes where in the outputs."""
        if not self.bitmask:
            return [shard.layout for shard in self.shards]
        packed: dict[str, int] = {}
        for i, (name, count) in enumerate(zip(self.plan.names, engine.count_packed(), strict=True)):
            self.before[i] = packed.get(whole(name), 0)
            packed[whole(name)] = self.before[i] + count
        return [
            lay_out(s.header, {n: packed[n] for n in s.entries if n in packed}, str(s.path))
            for s in self.shards
        ]

    def _add_up(self, engine: _C.Pruning, nonzero_others: list[int], result: StreamPruning) -> None:
        """Complete the result, once it is sure that exactly what was asked for is kept."""
        plan = self.plan
        result.readings = engine.readings
        result.thresholds = dict(zip(plan.scope_names, engine.thresholds, strict=True))
        result.kept = dict(zip(plan.names, engine.kept, strict=True))
        kept = [0] * len(self.keep)
        for scope, count in zip(plan.scopes, engine.kept, strict=True):
            kept[scope] += count
        for name, want, got in zip(plan.scope_names, self.keep, kept, strict=True):
            if want != got:
                raise ValueError(f"{name} must keep {want} weights, got {got}")
        parts = self.ranks.gather((engine.nonzero, nonzero_others, engine.smallest))
        nonzero = dict(
            zip(plan.names, map(sum, zip(*(p[0] for p in parts), strict=True)), strict=True)
        )
        for (_, entry), counts in zip(
            self.others, zip(*(p[1] for p in parts), strict=True), strict=True
        ):
            nonzero[entry.name] = sum(counts) if entry.dtype.size else entry.numel()
        for name in plan.names:
            if isinstance(name, Slice):
                for counted in (nonzero, result.kept):
                    counted[name.parameter] = counted.get(name.parameter, 0) + counted[name]
        result.nonzero = {name: nonzero[name] for name in result.shapes}
        least = {
            name: min((v for v in values if not math.isnan(v)), default=math.nan)
            for name, values in zip(
                plan.names, zip(*(p[2] for p in parts), strict=True), strict=True
            )
        }
        for layer in (
            x for module, layers in plan.modules.items() if module != AUX for x in layers
        ):
            found = [least[p] for p in layer.parameters if not math.isnan(least[p])]
            if found:
                result.smallest.update(dict.fromkeys(layer.parameters, min(found)))


def _masks_header(plan: Plan, result: StreamPruning) -> Header:
    """The header of the file that `dimap.save_masks` would write."""
    shapes = {name: list(result.shapes[name]) for name in wholes(plan.names)}
    settings = result.mask_metadata() | {"dimap_masks": "1", "shapes": json.dumps(shapes)}
    described = [(n, DTYPES["U8"], [(math.prod(shape) + 7) // 8]) for n, shape in shapes.items()]
    return make_header(described, settings, "the file of masks")


def _prune_state(
    checkpoint: StateDict,
    sparsity: float | Mapping[str, float],
    targets: list[Path],
    ending: str,
    masks: Path | None,
    bitmask: bool,
    result: StreamPruning,
    progress: Progress,
) -> None:
    """Prune what is in memory, write it, and complete the result."""
    from ..pruning import prune

    progress.step("pruning")
    state = {name: checkpoint.get(name) for name in wholes(result.shapes)}
    pruning = prune(
        state, sparsity, scope=result.scope, normalize=result.normalize, patterns=checkpoint.choice
    )
    checkpoint.mask_copies(pruning.masks)
    progress.step("writing")
    checkpoint.save(
        targets, safetensors=ending == ".safetensors", pack=pruning.masks if bitmask else ()
    )
    if masks is not None:
        pruning.save_masks(masks)
    progress.step("counting")
    result.thresholds, result.kept = pruning.thresholds, pruning.kept
    result.nonzero, result.smallest = pruning.nonzero, pruning.smallest


def _model(
    checkpoint: Checkpoint, names: Sequence[str], timm_model: str | None
) -> tuple[nn.Module | None, str]:
    """The model for counting FLOPs, pruned or only its shapes, or the reason why there is none."""
    described = (
        (timm_model, {})
        if timm_model
        else _timm.described(str(checkpoint.place), checkpoint.metadata)
    )
    if described is None:
        return None, "IN does not say which timm model it is; --timm-model NAME says it"
    # Names and shapes are enough where the weights are not in memory.
    streamed = isinstance(checkpoint, Shards)
    state = {n: checkpoint.tensors[n].meta() if streamed else checkpoint.get(n) for n in names}
    try:
        return _timm.with_weights(*described, state), ""
    except (ValueError, ModuleNotFoundError) as error:
        if timm_model:
            raise
        return None, str(error)
