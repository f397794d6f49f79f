"""`dimap bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .._dtypes import Name
from ..report.text import Column, Fitting, make_console, table
from .common import Debug, Json, option, print_json, print_wrote, report_errors
from .progress import Bar

if TYPE_CHECKING:
    from ..bench import Bench, Row

LOST = ("faults", "range", "ns/weight", "GB/s", "× plain")  # where there is no room for all

SOURCE = (
    "swin_t, swin_s, swin_b or swin_l: random weights of those shapes. Or a checkpoint, or "
    "timm:NAME with fresh weights: its prunable weights."
)


def bench(
    source: Annotated[str, typer.Argument(metavar="[IN]", help=SOURCE)] = "swin_b",
    device: Annotated[Literal["cpu", "cuda"], option("Where to run.")] = "cpu",
    dtype: Annotated[Name | None, option("Convert the weights first.")] = None,
    sparsity: Annotated[float, option("The share of weights to drop.", "--sparsity", "-s")] = 0.55,
    scope: Annotated[
        Literal["module", "global", "layer"], option("Where one threshold holds.")
    ] = "module",
    threads: Annotated[
        int | None, option("Threads of the CPU. Default: all of them.", min=1)
    ] = None,
    rounds: Annotated[int, option("Rounds of each job.", min=1)] = 11,
    quick: Annotated[
        bool,
        option("Fewer rounds, and plain PyTorch on a part of the weights only.", "--quick"),
    ] = False,
    plot: Annotated[Path | None, option("Draw the times into this file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time score, select and prune_ beside a copy, plain PyTorch and torch.nn.utils.prune."""
    with report_errors(debug), Bar("preparing") as bar:
        from ..bench import bench as measure

        if plot is not None:
            from ..plots import bench_times, check_path

            check_path(plot)
        found = measure(
            source, dtype=dtype, device=device, sparsity=sparsity, scope=scope, threads=threads,
            rounds=rounds, quick=quick, progress=bar,
        )  # fmt: skip
        if plot is not None:
            bench_times(found, plot)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
    if plot is not None and not as_json:
        print_wrote(str(plot))


def _print(found: Bench) -> None:
    machine, weights = found.machine, found.rows[0].weights
    columns = [
        Column("job", lambda row: row.job + ("*" if row.weights < weights else ""), left=True),
        Column("time", _time),
        Column("ns/weight", lambda row: _short(row.nanoseconds)),
        Column("GB/s", lambda row: _short(row.nbytes / row.timing.median / 1e9)),
        Column("× copy", lambda row: row.job != "copy" and _short(row.beside_copy[0])),
        Column("range", _range),
        Column("× plain", _faster),
        Column("faults", lambda row: f"{row.timing.faults:,}"),
    ]
    shown = table(columns, found.rows)
    shown.title_justify, shown.show_edge = "left", False
    shown.title = (
        f"{found.source}: {weights / 1e6:.1f} M weights, {found.dtype}, in {found.tensors} tensors"
    )
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    note = (
        f"{where}, torch {machine['torch']}, load {machine['load_before']:.1f}. Medians of "
        f"{len(found.rows[0].timing.seconds)} rounds, all in turns. × copy: the time over that of a "
        "copy of the weights, and the range of eight in ten rounds. × plain: how many times as fast as "
        "sort, cumsum, divide, scatter, topk and compare. Torch prune is global_unstructured by "
        "magnitude. Faults: fresh pages of memory."
    )
    if any(row.weights < weights for row in found.rows):
        note += " A * was timed on a part of the weights and compared by the weight."
    make_console().print(Fitting(shown, *LOST), note, sep="")


def _time(row: Row) -> str:
    seconds = row.timing.median
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _range(row: Row) -> str:
    _, low, high = row.beside_copy
    return f"{_short(low)}-{_short(high)}" if low < high else ""


def _faster(row: Row) -> str:
    return "" if row.faster is None or row.job.startswith("plain") else _short(row.faster)


def _short(number: float) -> str:
    """Two figures, or all before the point."""
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"
