"""`dimap prune IN… --out-dir DIR`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from .._files import remove_empty
from ..checkpoint.inputs import Item, find_inputs
from ..checkpoint.manifest import Manifest
from ..checkpoint.many import Job, Outcome, State, check_job
from ..checkpoint.workers import prune_all
from ..distributed.launch import launched
from ..report.text import Fitting, make_console
from .common import print_error, print_json
from .progress import Bar

COLOURS: dict[State, str] = {"done": "green", "done before": "default", "failed": "red"}


def prune_many(arguments: Sequence[str], job: Job, jobs: int, as_json: bool) -> None:
    """Prune the checkpoints that the arguments mean; ends with exit code 1 if any failed."""
    start = time.monotonic()
    with ExitStack() as outputs, launched() as ranks:
        items: Sequence[Item] = ()
        if ranks.rank == 0:
            items = find_inputs(arguments, job.out_dir)
            check_job(job, items)
            outputs.callback(remove_empty, [*_new_folders(job, items)])
            job.out_dir.mkdir(parents=True, exist_ok=True)
        items = ranks.gather(items)[0]
        known = Manifest(job.out_dir).read()
        mine = ranks.take(sorted(items, key=lambda item: -item.size))  # no long one last
        tasks = ((item, known.get(item.name)) for item in mine)
        outcomes: list[Outcome] = []
        sizes = {item.name: item.size for item in items}
        with ranks.apart(), Bar("pruning") as bar:
            bar.step(f"pruning {len(items)} checkpoints", sum(sizes.values()))
            for outcome in prune_all(job, tasks, jobs):
                outcomes.append(outcome)
                bar.advance(sizes[outcome.out])
                if outcome.error:
                    named = outcome.source in outcome.error
                    print_error(outcome.error if named else f"{outcome.source}: {outcome.error}")
        outcomes = [outcome for found in ranks.gather(outcomes) for outcome in found]
    if ranks.rank > 0:
        return  # rank 0 tells
    order = {item.name: place for place, item in enumerate(items)}
    outcomes.sort(key=lambda outcome: order[outcome.out])
    seconds = time.monotonic() - start
    if as_json:
        print_json(_to_dict(job, outcomes, seconds))
    else:
        _print(job, outcomes, seconds)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _new_folders(job: Job, items: Sequence[Item]) -> set[Path]:
    """The folders that are not there yet and will hold outputs."""
    outputs = (path for item in items for path in job.outputs(item.name).values())
    return {p for path in outputs for p in path.absolute().parents if not p.exists()}


def _to_dict(job: Job, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The JSON object; schema "dimap.prune_many", version 1."""
    counts = Counter(outcome.state for outcome in outcomes)
    return {
        "schema": "dimap.prune_many",
        "version": 1,
        "out_dir": str(job.out_dir),
        "manifest": str(Manifest(job.out_dir).path),
        "settings": dict(job.settings),
        "done": counts["done"],
        "done_before": counts["done before"],
        "failed": counts["failed"],
        "seconds": round(seconds, 3),
        "checkpoints": [asdict(outcome) for outcome in outcomes],
    }


def _print(job: Job, outcomes: Sequence[Outcome], seconds: float) -> None:
    from rich.table import Table
    from rich.text import Text

    console = make_console(highlight=False)
    table = Table("OUT", box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in ("weights", "removed", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("")
    for column in (table.columns[0], table.columns[-1]):
        column.overflow = "fold"
    for outcome in outcomes:
        weights, removed = "", ""
        if outcome.weights is not None and outcome.kept is not None:
            weights = f"{outcome.weights:,}"
            removed = f"{100 * (1 - outcome.kept / max(outcome.weights, 1)):.2f} %"
        state = Text(outcome.state, style=COLOURS[outcome.state])
        if outcome.error:
            state.append(f": {outcome.error}", style="default")
        took = "" if outcome.state == "done before" else f"{outcome.seconds:.1f}"
        table.add_row(Text(outcome.out), weights, removed, took, state)
    console.print(Fitting(table, "seconds", "weights", "removed"))
    for outcome in outcomes:
        for note in outcome.notes:
            console.print(Text(f"{outcome.source}: {note}", style="yellow"), soft_wrap=True)
    counts = Counter(outcome.state for outcome in outcomes)
    told = ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])
    console.print(Text(f"{told}, in {seconds:.1f} s; {Manifest(job.out_dir).path}"), soft_wrap=True)
