"""Prune checkpoints into a folder: what is done stays done, and what fails holds nothing up.

The line "begun" in the manifest stands before an output appears, the line "done" after it is there.
An output without "done" is thus of a command that crashed between, and is made again by the same
command. Where an output is replaced, "begun" holds the line of the one that it replaces.
"""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from .._errors import sentence
from .._files import remove
from ..budgets import Budgets
from .inputs import ENDINGS, Item
from .manifest import Manifest, Record, files_of, same_files, same_stamps
from .prune import prune_checkpoint

State = Literal["done", "done before", "failed"]
Task = tuple[Item, Record | None]  # what to prune, and the last line about its output


@dataclass(frozen=True)
class Job:
    """What the checkpoints of a command share.

    settings: the arguments of `prune_checkpoint` that make an output what it is, beside its input;
        values that JSON has.
    more: its other arguments, as `model`.
    masks, reports: folders, or None where none are wanted.
    force: replace outputs that are there and that the manifest does not tell to be these.
    checksum: note the SHA-256 of inputs and outputs.
    debug: print tracebacks.
    """

    out_dir: Path
    settings: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)
    masks: Path | None = None
    reports: Path | None = None
    force: bool = False
    checksum: bool = False
    debug: bool = False

    def outputs(self, name: str) -> dict[str, Path]:
        """The places of OUT, masks and report for an output of that name."""
        stem = os.path.splitext(name)[0] if name.lower().endswith(ENDINGS) else name
        found = {"out": self.out_dir / name}
        if self.masks is not None:
            found["masks"] = self.masks / f"{stem}.safetensors"
        if self.reports is not None:
            found["report"] = self.reports / f"{stem}.json"
        return found


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint.

    weights, kept, nonzero: of the whole model, as in `dimap.Report`; None where it failed.
    seconds: that it took now. notes: what the user should know of it.
    """

    source: str
    out: str
    state: State
    weights: int | None = None
    kept: int | None = None
    nonzero: int | None = None
    seconds: float = 0.0
    error: str | None = None
    notes: Sequence[str] = ()


def check_job(job: Job, items: Sequence[Item]) -> None:
    """Refuse what would fail for every checkpoint, and outputs that would have the same place."""
    shares = {"sparsity": job.settings.get("sparsity"), **job.settings.get("shares", {})}
    for name, share in shares.items():
        if isinstance(share, float) and not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    names = {each.name for each in fields(Budgets)}
    Budgets(**{name: value for name, value in job.settings.items() if name in names})
    ins = {item.path.resolve(): item.source for item in items if item.path}
    outs = {Manifest(job.out_dir).path.resolve(): "the manifest"}
    for item in items:
        for kind, path in job.outputs(item.name).items():
            place, here = path.resolve(), f"the {kind} of {item.source}"
            for above in (place, *place.parents):
                if above in ins:
                    raise ValueError(f"{here} must lie apart from {ins[above]}, got {path}")
            if place in outs:
                raise ValueError(
                    f"{here} must have a place of its own, got {path}, as has {outs[place]}; a quoted "
                    "pattern, as in 'runs/*/best.pth', keeps the folders that its wildcards match"
                )
            outs[place] = here
    for place, name in (outs | ins).items():
        for above in place.parents:
            if above in outs:
                raise ValueError(f"{name} must lie apart from {outs[above]}, got {place}")


def prune_one(job: Job, item: Item, record: Record | None) -> Outcome:
    """Prune a checkpoint unless that is done; an error becomes an outcome.

    record: the last line about this output in the manifest.
    """
    start = time.monotonic()
    state: State = "done before"
    try:
        record = _last(job, item, record)
        if not _is_done(job, item, record):
            state, record = "done", _prune(job, item, record)
    except Exception as error:
        if job.debug:
            traceback.print_exc()
        seconds = round(time.monotonic() - start, 3)
        return Outcome(item.source, item.name, "failed", seconds=seconds, error=sentence(error))
    assert record is not None
    seconds = 0.0 if state == "done before" else round(time.monotonic() - start, 3)
    counts = (record["weights"], record["kept"], record["nonzero"])
    notes = record.get("notes", ())
    return Outcome(item.source, item.name, state, *counts, seconds, notes=notes)


def _last(job: Job, item: Item, record: Record | None) -> Record | None:
    """The line that tells of what is there: where a run ended before it replaced that, the earlier."""
    earlier = record.get("before") if record and record["state"] == "begun" else None
    present = _present(job.outputs(item.name))
    return earlier if earlier and _are_those_of(earlier, present) else record


def _is_done(job: Job, item: Item, record: Record | None) -> bool:
    """Whether all outputs are there, made with these settings from these files.

    Raises FileExistsError where something else is there and not `force`.
    """
    places = job.outputs(item.name)
    present = _present(places)
    if not present:
        return False
    if record is None or record["state"] == "failed":
        why = "exists already"
    elif record["state"] == "begun" and record["settings"] == job.settings:
        return False
    elif record["state"] == "begun":
        why = "was begun with other settings"
    elif record["settings"] != job.settings:
        why = "was made with other settings"
    elif item.path and not same_files(item.path, record["input"]):
        why = f"was made when {item.source} was another"
    elif not _are_those_of(record, present):
        why = "is not what was made"
    else:
        return len(present) == len(places)  # else the missing ones are made again
    if not job.force:
        place = str(next(iter(present.values())))
        raise FileExistsError(errno.EEXIST, f"{why} and is replaced only by force (--force)", place)
    return False


def _present(places: Mapping[str, Path]) -> dict[str, Path]:
    return {kind: path for kind, path in places.items() if os.path.lexists(path)}


def _are_those_of(record: Record, present: Mapping[str, Path]) -> bool:
    """Whether the files are those that a "done" line tells of."""
    return all(same_files(p, record["outputs"].get(kind, ())) for kind, p in present.items())


def _prune(job: Job, item: Item, record: Record | None) -> Record:
    """Prune, and write a line of the manifest; returns that line."""
    start = time.monotonic()
    manifest = Manifest(job.out_dir)
    places = job.outputs(item.name)
    replace = any(os.path.lexists(path) for path in places.values())  # `_is_done` allows it
    common = {"in": item.source, "settings": dict(job.settings), "dimap": __version__}
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    earlier = record if record and record["state"] == "done" and replace else None
    manifest.append(item.name, "begun", **common, **({"before": earlier} if earlier else {}))
    try:
        before = _inputs(item)
        wanted = {kind: path for kind, path in places.items() if kind != "out"}
        arguments = {**job.settings, **job.more, **wanted, "force": replace}
        pruned = prune_checkpoint(item.source, places["out"], **arguments)
        report = pruned.report()
    except BaseException as error:  # Ctrl-C, too
        # The outputs are what they were: so is what the manifest tells of them.
        with suppress(OSError, ValueError):
            last = manifest.read().get(item.name)
            if last is None or last["state"] != "begun":
                pass  # another dimap was faster
            elif earlier and _are_those_of(earlier, _present(places)):
                kept = {key: earlier[key] for key in earlier if key not in ("version", "out")}
                manifest.append(item.name, **kept)
            elif isinstance(error, Exception):
                manifest.append(item.name, "failed", **common, error=sentence(error))
        raise
    read = _inputs(item, job.checksum)
    if not same_stamps(before, read):
        for path in places.values():
            remove(path)
        raise ValueError(f"{item.source} must not change while it is read")
    done = {
        **common,
        "input": read,
        "outputs": {kind: files_of(path, job.checksum) for kind, path in places.items()},
        "weights": report.weights,
        "kept": report.kept,
        "nonzero": report.nonzero,
        "notes": pruned.notes,
    }
    manifest.append(item.name, "done", **done, seconds=round(time.monotonic() - start, 3))
    return done


def _inputs(item: Item, checksum: bool = False) -> list[Record]:
    return files_of(item.path, checksum) if item.path else []
