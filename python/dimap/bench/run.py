"""score, select and prune_ beside a copy, plain PyTorch and torch.nn.utils.prune, in one run."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import build_info, ops
from ..checkpoint import open_checkpoint
from ..checkpoint.base import Progress, Silent
from ..groups.plan import Plan
from . import plain, shapes
from .timing import Job, Timing, time_in_turns

QUICK_WEIGHTS = 4_000_000  # of these many weights the slow yardsticks are timed with quick=True
DTYPES: dict[str, torch.dtype] = {known.name: dtype for dtype, known in ops.DTYPES.items()}


@dataclass(frozen=True)
class Problem:
    """What the jobs work on: the arguments of the operators."""

    weights: list[Tensor]
    layers: list[int]
    modules: list[int]
    keep: list[int]

    @property
    def count(self) -> int:
        """How many weights there are."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(weight.nbytes for weight in self.weights)


@dataclass(frozen=True)
class Row:
    """One job.

    job: "copy", "score", "select", ``"prune_"``, with ", graph" where a CUDA graph was replayed;
        "plain score", "plain select": sort, cumsum, divide, scatter, topk, compare; "torch prune":
        `torch.nn.utils.prune.global_unstructured` by magnitude, which answers another question.
    weights, nbytes: what it worked on; a slow yardstick may have had a part.
    timing: its rounds.
    beside_copy: its time over that of a copy of the same bytes: median, tenth and ninetieth percentile.
    faster: how many times as long plain PyTorch takes for the same weights; None where it has no like.
    """

    job: str
    weights: int
    nbytes: int
    timing: Timing
    beside_copy: tuple[float, float, float]
    faster: float | None = None

    @property
    def nanoseconds(self) -> float:
        """Of one weight."""
        return self.timing.median / self.weights * 1e9

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        median = self.timing.median
        return {
            "job": self.job,
            "weights": self.weights,
            "seconds": median,
            "all_seconds": self.timing.seconds,
            "page_faults": self.timing.faults,
            "weights_per_second": self.weights / median,
            "bytes_per_second": self.nbytes / median,
            "beside_copy": self.beside_copy[0],
            "beside_copy_spread": self.beside_copy[1:],
            "times_as_fast_as_plain": self.faster,
        }


@dataclass(frozen=True)
class Bench:
    """What `bench` measured: the rows, and what they were measured on."""

    source: str
    dtype: str
    device: str
    sparsity: float
    scope: str
    tensors: int
    rows: tuple[Row, ...]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {"rows": [row.to_dict() for row in self.rows]}


def bench(
    source: str = "swin_b",
    *,
    dtype: str | None = None,
    device: str = "cpu",
    sparsity: float = 0.55,
    scope: str = "module",
    threads: int | None = None,
    rounds: int = 11,
    quick: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Time the operators on a model's weights, beside what else there is.

    source: "swin_t", "swin_s", "swin_b" or "swin_l": random weights of those shapes; or what
        `open_checkpoint` takes ("timm:NAME" with fresh weights): its prunable weights, which must fit
        into memory twice.
    dtype: "float32", "bfloat16" or "float16"; None: as the source has them, float32 for random ones.
    device: "cpu" or "cuda". sparsity, scope: as in `dimap.select`.
    threads: of the CPU; None: as many as torch has.
    rounds: of each job but plain PyTorch and torch.nn.utils.prune, which are timed once.
    quick: five rounds, and these two on about 4 million of the weights, in whole tensors.

    All jobs take turns in one process. Raises as `open_checkpoint` and `find_modules`, and ValueError
    for values other than these.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a GPU, and torch sees none")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        problem = _problem(source, dtype, sparsity, scope, device)
        rows = _measure(problem, device, 5 if quick else rounds, quick, progress or Silent())
        machine = _machine(device)
    finally:
        torch.set_num_threads(before)
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in problem.weights})
    return Bench(
        source=source,
        dtype=", ".join(kinds),
        device=device,
        sparsity=sparsity,
        scope=scope,
        tensors=len(problem.weights),
        rows=tuple(rows),
        machine=machine,
    )


def _problem(source: str, dtype: str | None, sparsity: float, scope: str, device: str) -> Problem:
    if source in shapes.CONFIGS:
        if scope not in ("module", "global", "layer"):
            raise ValueError(f"scope must be module, global or layer for {source}, got {scope!r}")
        weights, layers, modules, keep = shapes.problem(
            source, DTYPES[dtype or "float32"], scope, sparsity
        )
    else:
        with open_checkpoint(source, random_init=source.startswith("timm:")) as checkpoint:
            plan = Plan.of_shapes(checkpoint.shapes(), scope, "layer", ties=checkpoint.ties())
            weights = [checkpoint.get(name) for name in plan.names]
        layers, modules, keep = plan.layers, plan.scopes, plan.keep(sparsity)
        if dtype is not None:
            weights = [weight.to(DTYPES[dtype]) for weight in weights]
    return Problem([weight.to(device) for weight in weights], layers, modules, keep)


def _part(problem: Problem, most: int) -> Problem:
    """The first tensors, up to about so many weights, of which each module keeps the same share."""
    n = 1
    while n < len(problem.weights) and sum(w.numel() for w in problem.weights[:n]) < most:
        n += 1
    keep = []
    for module, kept in enumerate(problem.keep):
        sizes = [
            w.numel() * (m == module) for w, m in zip(problem.weights, problem.modules, strict=True)
        ]
        keep.append(kept * sum(sizes[:n]) // max(sum(sizes), 1))
    return Problem(problem.weights[:n], problem.layers[:n], problem.modules[:n], keep)


def _measure(
    problem: Problem, device: str, rounds: int, quick: bool, progress: Progress
) -> list[Row]:
    weights, layers, modules, keep = problem.weights, problem.layers, problem.modules, problem.keep
    target = [torch.empty_like(weight) for weight in weights]
    part = _part(problem, QUICK_WEIGHTS) if quick else problem

    def copy() -> None:
        for to, weight in zip(target, weights, strict=True):
            to.copy_(weight)

    own: dict[str, Job] = {
        "copy": copy,
        "score": lambda: ops.score(weights, layers),
        "select": lambda: ops.select(weights, layers, modules, keep),
        "prune_": lambda: ops.prune_(target, layers, modules, keep),
    }
    if device == "cuda":
        own |= {f"{name}, graph": _graph(own[name]) for name in ("score", "select")}
    slow: dict[str, Job] = {
        "plain score": lambda: plain.score(part.weights),
        "plain select": lambda: plain.select(part.weights, part.modules, part.keep),
        "torch prune": lambda: plain.global_unstructured(
            part.weights, 1 - sum(part.keep) / max(part.count, 1)
        ),
    }
    repeats = dict.fromkeys(own, rounds) | dict.fromkeys(slow, 3 if device == "cuda" else 1)
    total = sum(n + (n > 1) for n in repeats.values())
    progress.step("timing", total)
    timings = time_in_turns(own | slow, repeats, {"prune_": copy}, device, progress.advance)
    rows = []
    for name, timing in timings.items():
        of = part if name in slow else problem
        share = of.nbytes / problem.nbytes
        copied = Timing([seconds * share for seconds in timings["copy"].seconds])
        like = timings.get(f"plain {name.split(',')[0]}")
        faster = None
        if like is not None:
            faster = like.median / part.count / (timing.median / problem.count)
        rows.append(Row(name, of.count, of.nbytes, timing, timing.beside(copied), faster))
    return rows


def _graph(job: Job) -> Job:
    """The job captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = job()

    def replay() -> None:
        graph.replay()

    replay.kept = kept  # type: ignore[attr-defined]  # the graph writes into it
    return replay


def _machine(device: str) -> dict[str, Any]:
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    found = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dimap": build_info(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})
