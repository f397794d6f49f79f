"""Prune a checkpoint into another: exactly, and safetensors without loading them.

Memory does not grow with a safetensors checkpoint, nor with its largest tensor (`streaming`); what torch
saved is pruned in memory. The result is bit by bit that of `dimap.prune`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, wraps
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .._errors import first_line
from .._files import naming, open_safetensors
from ..budgets import Budgets, costs_of, solve
from ..distributed.launch import group_of
from ..distributed.ranks import Ranks
from ..groups import AUX, Choice, Patterns, Slice, choose, part_shape, whole, wholes
from ..groups.nm import NM
from ..groups.plan import Normalize, Plan, Scope, Sparsity, check_choice
from ..methods import METHODS
from ..report import Report, build_report
from ..report.pruned import count_dense
from . import HUB, open_checkpoint
from .base import Checkpoint, Progress, Silent, raw_bytes
from .bitmask import VERSIONS, Format
from .card import add_card_section
from .counted import model_of
from .native import Told
from .outputs import creating_outputs
from .shards import Shards
from .streaming import Stream, StreamPruning, check_agreement, check_dtypes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ..budgets.asked import Wanted

__all__ = ["Progress", "StreamPruning", "prune_checkpoint", "pruning_checkpoint"]

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def pruning_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    target: str | os.PathLike[str],
    sparsity: Sparsity = None,
    *,
    nm: str | None = None,
    shares: Mapping[str, float] | None = None,
    method: str = "dimap",
    scope: Scope | None = None,
    normalize: Normalize | None = None,
    patterns: Patterns | Choice | None = None,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
    input_norms: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    format: Format = "dense",
    key: str | None = None,
    all_copies: bool = False,
    random_init: bool = False,
    model: str | None = None,
    input_size: int | Sequence[int] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | Ranks | None = None,
    **budgets: Unpack[Wanted],
) -> Iterator[StreamPruning]:
    """Prune a checkpoint into another, exactly as `dimap.prune` does it with the loaded weights.

    `prune_checkpoint` is a function, which returns when the outputs are there; `pruning_checkpoint` a
    block, at whose end they appear, unless it fails.

    source: what `open_checkpoint` takes, with `key` and `random_init`, or what it gave. It is only
        read. Safetensors stream by; files of torch.save and timm models are pruned in memory.
    target: a file for a file, a folder for a folder. It appears complete or not at all: the same
        headers, metadata, index and other files, with weights set to zero.
    sparsity, nm, scope, normalize, patterns, family, ignore: as in `dimap.select`. shares: other
        sparsities of single modules, by name.
    method: "dimap", "lamp", "uniform", "global_magnitude" or "wanda": the scope and normalization
        where these are not given.
    input_norms: for "wanda", a safetensors file of what `dimap.saliency.input_norms` gave.
    masks: a file for the masks (see `dimap.load_masks`), one bit a weight.
    report: a file that ends in .json for the report; or a folder for it, pictures and a page.
    format: "bitmask" writes files of one bit a weight and the nonzero values, "compact" has these
        compressed (docs/format.md); `dimap.load_file` and `dimap expand` read both.
    all_copies: give other copies of the weights the same masks: a teacher's beside them in a file,
        earlier checkpoints in a folder.
    model, input_size: for counting FLOPs: the model's name, where the checkpoint does not say it
        ("timm:NAME", "torchvision:NAME", "hf:ORG/NAME", a folder with the config.json of transformers), and
        the size of its input (see `flops.count_flops`). Safetensors outputs say `model` in their metadata,
        unless it is a folder. What does not fit is a ValueError before any work; where neither is given and
        `report` has no FLOPs, a note says why.
    force: replace outputs that are there already.
    group: several processes do it together, each its part of the bytes: all of them call this with
        the same arguments and see the same files. The first one creates the outputs and returns
        when they are there, as do the others.
    budgets: as in `dimap.select`, and `size`: bytes of the files of weights, with format
        "bitmask".

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
        check_choice("format", format, ["dense", *VERSIONS.values()])
        check_choice("method", method, [name for name, m in METHODS.items() if m.streams])
        if METHODS[method].needs_norms != (input_norms is not None):
            by_norms = " or ".join(name for name, m in METHODS.items() if m.needs_norms)
            raise ValueError(
                f"--method {by_norms} (method) and the norms of the inputs (--input-norms) need each "
                f"other, got method={method!r} and input_norms={input_norms!r}"
            )
        wanted = Budgets.of("prune_checkpoint", budgets)
        groups = NM.parse(nm)
        exact = groups is not None and groups.n is not None
        if groups is not None:
            groups.refuse(sparsity=sparsity, shares=shares, scope=scope, normalize=normalize)
        ranking = METHODS["uniform" if exact else method]
        scope, normalize = scope or ranking.scope, normalize or ranking.normalize
        if isinstance(checkpoint, Shards):
            checkpoint.check_dense()
        if groups is not None or scope == "row":
            wanted.refuse(scope)
        checkpoint.choice = choose(patterns, family, ignore) or checkpoint.choice
        shapes = checkpoint.shapes()
        plan = Plan.of_shapes(
            shapes, scope, normalize, checkpoint.choice, checkpoint.ties(), groups
        )
        if groups is not None and groups.n is not None:
            sparsity = 1 - groups.n / groups.m
        modules = [name for name in plan.modules if name != AUX]
        given = _join(sparsity, shares or {}, modules, partly=bool(wanted.asked))
        if not wanted.asked:
            plan.keep(given)  # a wrong one is told before any work
        _check(checkpoint, plan, out, format, masks is not None, ranks)
        progress = progress if progress is not None and first else Silent()
        norms = digest = None
        if input_norms is not None:
            norms, digest = _read_norms(Path(input_norms), shapes, wholes(plan.names))
        parts = [p for layers in plan.modules.values() for x in layers for p in x.parameters]
        names = wholes(parts)
        named = model is not None or input_size is not None
        known = None
        if named or wanted.flops is not None or wanted.nominal_flops is not None:
            known = model_of(checkpoint, names, model, input_size)
        counted, says = known or (None, {})
        stream = None
        if isinstance(checkpoint, Shards):
            stream = Stream(checkpoint, plan, ranks, Told(progress), norms, says)
            settings = {
                "sparsity": given,
                "budgets": wanted.settings(),
                "scope": scope,
                "normalize": normalize,
                "masks": masks is not None,
                "format": format,
                "nm": nm,
                "norms": digest,
                "metadata": says,  # in the headers: the weights come after
            }
            check_agreement(checkpoint, plan, settings, ranks)
        parts = list(dict.fromkeys([*names, *parts]))
        result = StreamPruning(
            modules=plan.modules,
            thresholds={},
            scope=scope,
            normalize=normalize,
            sparsity={} if wanted.asked else plan.ratios(given),
            shapes={name: part_shape(shapes, name) for name in parts},
            dtypes={name: checkpoint.tensors[whole(name)].dtype.name for name in parts},
            notes=list(plan.notes),
            asked=wanted.settings(),
            saliency="magnitude" if input_norms is None else method,
        )
        if named:  # one that does not fit is told before any work
            _, flops, notes = count_dense(result, counted, input_size)
            if flops is None:
                raise ValueError(notes[0])

        written = {"masks": masks, "report": report}
        small = {kind: Path(path) for kind, path in written.items() if path is not None}
        made = stack.enter_context(
            creating_outputs(
                checkpoint, plan, out, small, ranks, force=force, all_copies=all_copies
            )
        )

        # The work. All ranks fill the files.
        if stream is not None:
            packing = stream.packed_size if format == "bitmask" else None
            costs = costs_of(wanted, plan, shapes, counted, input_size, packing)
            solved = solve(plan, given, wanted, costs, stream.weights)
            result.sparsity = solved.sparsity
            result.notes += solved.notes
            stream.fill(solved, format, made.files, made.masks, result)
        else:
            from .in_memory import fill_in_memory

            checkpoint.metadata |= says
            asked = {
                "sparsity": None if exact else given,
                "nm": nm,
                "budgets": wanted,
                "input_size": input_size,
                "counted": counted,
            }
            fill_in_memory(
                checkpoint, asked, norms, made.files, out, made.masks, format, result, progress
            )
        if wanted.size is not None:
            result.size = sum(file.stat().st_size for file in made.files)
        result.notes += checkpoint.notes
        if first and all_copies and checkpoint.others and made.masks is not None:
            from .copies import mask_others

            result.notes += mask_others(checkpoint, made.home, made.masks)
            if masks is None:
                made.masks.unlink()

        # What was done.
        def summarize() -> Report:
            why = "the first rank counts them"
            if first:
                try:
                    found = known or model_of(
                        checkpoint, names, None, None, asked=report is not None
                    )
                    built = found and found.model
                    return build_report(result, built, input_size, no_flops="")
                except Exception as error:  # of the library that builds it, too: a note, no end
                    why = first_line(error)
            return build_report(result, no_flops=why)

        result.summarize = cache(summarize)
        if made.report is not None:
            with naming(small["report"]):
                made.report.write(result.summary(), result)
        if first and checkpoint.path.startswith(HUB):
            add_card_section(made.home, build_report(result), checkpoint.path)
        yield result


def _read_norms(
    path: Path, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """The norms of a file, checked, of the parameters of these names; a digest of them."""
    from ..saliency import fit_norms

    with open_safetensors(path) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    norms = fit_norms(found, shapes, names)
    digest = sha256()
    for norm in norms.values():
        digest.update(raw_bytes(norm))
    return norms, digest.hexdigest()


def _completed(block: Callable[P, AbstractContextManager[T]], name: str) -> Callable[P, T]:
    """The function of that name that runs a block with nothing in it."""

    takes = signature(block)

    @wraps(block)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            takes.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        with block(*args, **kwargs) as result:
            pass
        return result

    run.__name__ = run.__qualname__ = name
    return run


prune_checkpoint = _completed(pruning_checkpoint, "prune_checkpoint")


def _join(
    sparsity: Sparsity, shares: Mapping[str, float], modules: Sequence[str], *, partly: bool
) -> Sparsity:
    """One sparsity, or one for each of the modules; partly: those that are not given are sought."""
    if not shares and (sparsity is not None or partly):
        return sparsity
    named: dict[str, Any] = {}
    # "qkv" is the module of every tower; "text.qkv" says more of one.
    for name, share in sorted(shares.items(), key=lambda item: item[0] in modules):
        here = [name] if name in modules else [m for m in modules if m.endswith(f".{name}")]
        if not here:
            raise ValueError(f"--module must name one of {', '.join(modules)}, got {name}")
        named |= dict.fromkeys(here, share)
    given: dict[str, Any] = dict(sparsity) if isinstance(sparsity, Mapping) else {}
    if sparsity is not None and not isinstance(sparsity, Mapping):
        given = dict.fromkeys(modules, sparsity)
    given |= named
    if partly:
        return given
    if missing := [name for name in modules if name not in given]:
        raise ValueError(f"give --sparsity, or --module NAME=SHARE for {' and '.join(missing)} too")
    return given


def _check(
    checkpoint: Checkpoint, plan: Plan, out: Path, form: Format, masks: bool, ranks: Ranks
) -> None:
    """Refuse what cannot be pruned, or not be written as it is asked for."""
    streamed = isinstance(checkpoint, Shards)
    if form == "compact" and ranks.size > 1:  # a block's place depends on the lengths of all before
        raise ValueError(
            f"one process must write with --format compact, got {ranks.size} ranks: leave torchrun out, "
            "or let them write with --format bitmask"
        )
    if not streamed and ranks.size > 1:
        raise ValueError(
            f"IN must be safetensors to be shared among {ranks.size} ranks, got {checkpoint.path}"
        )
    if (
        not streamed
        and form != "dense"
        and (checkpoint.is_folder or out.suffix.lower() != ".safetensors")
    ):
        raise ValueError(f"the output must end in .safetensors with --format {form}, got {out}")
    check_dtypes(checkpoint, plan)
    if not streamed or not (form == "bitmask" or masks):
        return
    for name, size in zip(plan.names, plan.sizes, strict=True):
        if isinstance(name, Slice) and size % 8:  # each begins with a byte of its own
            raise ValueError(
                f"{name} must have a multiple of 8 weights for masks or a bitmask file to be "
                f"streamed, got {size}: leave --masks out, and take --format compact for a smaller file"
            )
