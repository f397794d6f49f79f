"""Prune checkpoints into a folder: what is done stays done, and what fails holds nothing up.

The line "begun" in the manifest stands before an output appears, the line "done" after it has been
read back. An output without "done" is thus of a command that crashed between, and is made again.
"""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import __version__
from .._files import remove
from .._progress import Bar
from .._support import sentence
from ..pruning import Normalize, Scope
from . import open_checkpoint
from ._inputs import ENDINGS, TIMM, Item
from ._manifest import Manifest, hashed, same_files, stamps_of
from ._prune_file import prune_file

State = Literal["done", "done before", "failed"]
Record = dict[str, Any]  # a line of the manifest
Task = tuple[Item, Record | None]


@dataclass(frozen=True)
class Settings:
    """What makes an output what it is, beside its input."""

    sparsity: float | None
    shares: Mapping[str, float]
    scope: Scope
    normalize: Normalize
    random_init: bool = False
    bitmask: bool = False


@dataclass(frozen=True)
class Job:
    """What the checkpoints of a command share.

    masks, reports: folders, or None where none are wanted.
    timm_model, input_size: for counting FLOPs (see `prune_file`).
    force: replace outputs that are there and that the manifest does not tell to be these.
    debug: print tracebacks.
    """

    out_dir: Path
    settings: Settings
    masks: Path | None = None
    reports: Path | None = None
    timm_model: str | None = None
    input_size: tuple[int, ...] | None = None
    force: bool = False
    debug: bool = False

    def outputs(self, name: str) -> dict[str, Path]:
        """The places of OUT, masks and report for an output of that name."""
        stem = os.path.splitext(name)[0] if name.endswith(ENDINGS) else name
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
    seconds: that it took now.
    """

    source: str
    out: str
    state: State
    weights: int | None = None
    kept: int | None = None
    nonzero: int | None = None
    seconds: float = 0.0
    error: str | None = None


def check_job(job: Job, items: Sequence[Item]) -> None:
    """Refuse what would fail for every checkpoint, and outputs that would have the same place."""
    shares = {"sparsity": job.settings.sparsity, **job.settings.shares}
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    ins = {Path(i.source).resolve(): i.source for i in items if not i.source.startswith(TIMM)}
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
    try:
        if _is_done(job, item, record):
            assert record is not None
            return Outcome(item.source, item.name, "done before", **_counts(record))
        done = _prune(job, item, record)
    except Exception as error:
        if job.debug:
            traceback.print_exc()
        seconds = round(time.monotonic() - start, 3)
        return Outcome(item.source, item.name, "failed", seconds=seconds, error=sentence(error))
    seconds = round(time.monotonic() - start, 3)
    return Outcome(item.source, item.name, "done", seconds=seconds, **_counts(done))


def _counts(record: Record) -> Any:
    return {name: record[name] for name in ("weights", "kept", "nonzero")}


def _is_done(job: Job, item: Item, record: Record | None) -> bool:
    """Whether all outputs are there, made with these settings from these bytes.

    Raises FileExistsError where something else is there and not `force`.
    """
    places = job.outputs(item.name)
    present = {kind: path for kind, path in places.items() if os.path.lexists(path)}
    state = record["state"] if record else None
    if not present or state == "begun":
        return False
    if record is None or state != "done":
        why = "exists already"
    elif record["settings"] != asdict(job.settings):
        why = "was made with other settings"
    elif not _same(item.source, record["input"]):
        why = f"was made when {item.source} was another"
    elif not all(_same(str(p), record["outputs"].get(kind)) for kind, p in present.items()):
        why = "is not what was made"
    else:
        return len(present) == len(places)  # else the missing ones are made again
    if not job.force:
        place = str(next(iter(present.values())))
        raise FileExistsError(errno.EEXIST, f"{why} and is replaced only by force (--force)", place)
    return False


def _same(path: str, recorded: Sequence[Record] | None) -> bool:
    if path.startswith(TIMM):
        return recorded == []
    return recorded is not None and same_files(Path(path), recorded, torch.get_num_threads())


def _prune(job: Job, item: Item, record: Record | None) -> Record:
    """Prune, and tell the manifest; returns what it was told."""
    manifest = Manifest(job.out_dir)
    places = job.outputs(item.name)
    replace = any(os.path.lexists(path) for path in places.values())  # `_is_done` allows it
    common = {"in": item.source, "settings": asdict(job.settings), "dimap": __version__}
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    manifest.append(item.name, "begun", **common)
    start = time.monotonic()
    try:
        from_disk = not item.source.startswith(TIMM)
        before = stamps_of(Path(item.source)) if from_disk else {}
        with open_checkpoint(item.source, random_init=job.settings.random_init) as checkpoint:
            report = prune_file(
                checkpoint,
                places["out"],
                job.settings.sparsity,
                job.settings.shares,
                scope=job.settings.scope,
                normalize=job.settings.normalize,
                masks=places.get("masks"),
                report=places.get("report"),
                bitmask=job.settings.bitmask,
                force=replace,
                timm_model=job.timm_model,
                input_size=job.input_size,
                bar=Bar(""),  # never shown
            )
    except Exception as error:
        # The outputs are what they were: so is what the manifest tells of them.
        with suppress(OSError):
            if record and record["state"] != "failed" and replace:
                manifest.append(**_again(record))
            else:
                manifest.append(item.name, "failed", **common, error=sentence(error))
        raise
    sources = [Path(item.source)] if from_disk else []
    files = hashed([*places.values(), *sources], torch.get_num_threads())
    outputs = dict(zip(places, files, strict=False))
    inputs = files[-1] if from_disk else []
    if {file.path: file.stamp for file in inputs} != before:
        for path in places.values():
            remove(path)
        raise ValueError(f"{item.source} must not change while it is read")
    counts = {"weights": report.weights, "kept": report.kept, "nonzero": report.nonzero}
    told = {kind: [file._asdict() for file in made] for kind, made in outputs.items()}
    read = [file._asdict() for file in inputs]
    done = {**common, "input": read, "outputs": told, **counts}
    manifest.append(item.name, "done", **done, seconds=round(time.monotonic() - start, 3))
    return done


def _again(record: Record) -> Record:
    kept = {key: value for key, value in record.items() if key not in ("version", "out")}
    return {"name": record["out"], **kept}
