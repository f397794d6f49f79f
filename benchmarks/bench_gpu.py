"""select and score on a CUDA device, beside a copy of the weights and plain PyTorch, in one run.

    python benchmarks/bench_gpu.py [--seconds 150] [--output benchmarks/results/gpu.json]

Medians of CUDA events, all yardsticks of a row in turns, inputs beyond the L2 cache. The result is
written after every row, so that a run that is cut off leaves what it measured; a row that fails
says why and the next one goes on. Rows that no time is left for are named under "left out".
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dimap
import gpu_machine
import torch
from dimap.bench import plain, shapes
from torch import Tensor

BEYOND_L2 = 256 << 20  # bytes
Problem = tuple[list[Tensor], list[int], list[int], list[int]]


def time_in_turns(jobs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each job; at least three turns, at most 50, about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    until = time.monotonic() + seconds
    for turn in range(53):
        for name, job in jobs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = job()
            end.record()
            end.synchronize()
            del result
            if turn >= 2:  # the first ones load kernels and fill the allocator
                times[name].append(start.elapsed_time(end))
        if turn >= 4 and time.monotonic() > until:
            break
    return {name: statistics.median(t) for name, t in times.items()}


def extra_bytes(job: Callable[[], object], results: int) -> int:
    """Device memory that a job takes at most, beside its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = job()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before - results


def on_gpu(problem: Problem) -> Problem:
    return [w.cuda() for w in problem[0]], *problem[1:]


def swin(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """All jobs on a Swin's weights: eager, as a graph, beside the yardsticks."""
    problem = on_gpu(shapes.problem(name, dtype))
    weights, layers, modules, keep = problem
    count = sum(w.numel() for w in weights)
    copies = -(-BEYOND_L2 // (count * dtype.itemsize))
    sets = [weights, *([w.clone() for w in weights] for _ in range(copies - 1))]
    flat = [torch.cat([w.flatten() for w in s]) for s in sets]
    target = torch.empty_like(flat[0])
    turn = iter(range(1 << 60))

    def rotated(job: Callable[[int], object]) -> Callable[[], object]:
        return lambda: job(next(turn) % copies)

    graphs = []
    for s in sets:
        graph = torch.cuda.CUDAGraph()
        torch.ops.dimap.select(s, layers, modules, keep)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            masks = torch.ops.dimap.select(s, layers, modules, keep)
        graphs.append((graph, masks))
    ms = time_in_turns(
        {
            "copy": rotated(lambda i: target.copy_(flat[i])),
            "select": rotated(lambda i: torch.ops.dimap.select(sets[i], layers, modules, keep)),
            "select, graph replay": rotated(lambda i: graphs[i][0].replay()),
            "score": rotated(lambda i: torch.ops.dimap.score(sets[i], layers)),
        },
        4,
    )
    ms |= time_in_turns(
        {
            "plain select": rotated(lambda i: plain.select(sets[i], modules, keep)),
            "plain score": rotated(lambda i: plain.score(sets[i])),
        },
        4,
    )
    want = torch.ops.dimap.select([w.cpu() for w in weights], layers, modules, keep)
    same = all(torch.equal(a.cpu(), b) for a, b in zip(graphs[0][1], want, strict=True))
    graphs.clear()
    extra = extra_bytes(lambda: torch.ops.dimap.select(weights, layers, modules, keep), count)
    return {
        "shapes": name, "dtype": str(dtype).removeprefix("torch."), "weights": count, "ms": ms,
        "select_extra_bytes": extra, "extra_limit_bytes": count * dtype.itemsize // 20 + (32 << 20),
        "masks_equal_the_cpus": same,
    }  # fmt: skip


def large(count: int) -> dict[str, Any]:
    """select on one bfloat16 tensor: flat time to 4 G weights, more than 2^31 in one."""
    weight = torch.empty(count, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    keep = round(0.45 * count)
    job = partial(torch.ops.dimap.select, [weight], [0], [0], [keep])
    ms = time_in_turns({"copy": partial(torch.empty_like(weight).copy_, weight), "select": job}, 6)
    extra = extra_bytes(job, count)
    mask = job()[0]
    kept, least_kept, most_dropped = 0, float("inf"), 0.0
    for w, m in zip(weight.split(1 << 27), mask.split(1 << 27), strict=True):
        kept += int(m.sum())
        magnitude = w.abs().float()
        least_kept = min(least_kept, float(magnitude.masked_fill(~m, float("inf")).min()))
        most_dropped = max(most_dropped, float(magnitude.masked_fill(m, 0.0).max()))
    return {
        "shapes": "one tensor", "dtype": "bfloat16", "weights": count, "ms": ms,
        "select_ps_a_weight": ms["select"] * 1e9 / count,
        "select_extra_bytes": extra, "extra_limit_bytes": count // 10 + (32 << 20),
        "keeps_the_largest": kept == keep and least_kept >= most_dropped,
    }  # fmt: skip


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at beside what was measured: at most, or (faster) at least."""
    found = []

    def row(shape: str, dtype: str) -> dict[str, float]:
        found = [r for r in rows if (r["shapes"], r["dtype"]) == (shape, dtype)]
        return dict(max(found, key=lambda r: r["weights"])["ms"]) if found else {}

    def add(job: str, ms: dict[str, float], a: str, b: str, reach: float, aim: float) -> None:
        if a in ms and (not b or b in ms):
            value = ms[a] / ms[b] if b else ms[a]
            met = (lambda t: value >= t) if aim > reach else (lambda t: value <= t)
            found.append(
                {"job": job, "value": value, "reach": reach, "aim": aim,
                 "reached": met(reach), "aim_met": met(aim)}
            )  # fmt: skip

    f32, bf16, small = row("swin_b", "float32"), row("swin_b", "bfloat16"), row("swin_t", "float32")
    add("select float32, copies of the weights", f32, "select, graph replay", "copy", 1.5, 1.0)
    add(
        "select bfloat16, one tensor, copies of the weights",
        row("one tensor", "bfloat16"),
        "select",
        "copy",
        1.2,
        0.9,
    )
    add("select float32, times as fast as plain PyTorch", f32, "plain select", "select", 50, 150)
    add("score float32, times as fast as plain PyTorch", f32, "plain score", "score", 6, 12)
    add("score bfloat16, times as fast as plain PyTorch", bf16, "plain score", "score", 20, 40)
    add("select Swin-T, eager, ms", small, "select", "", 0.4, 0.2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="start no row after this long")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu.py needs a CUDA device, and torch found none")
    start = time.monotonic()
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "swin_b float32": lambda: swin("swin_b", torch.float32),
        "swin_b bfloat16": lambda: swin("swin_b", torch.bfloat16),
        "swin_t float32": lambda: swin("swin_t", torch.float32),
        "4 G bfloat16": lambda: large(4_000_000_000),
        "1 G bfloat16": lambda: large(1_000_000_000),
        "100 M bfloat16": lambda: large(100_000_000),
        "swin_t bfloat16": lambda: swin("swin_t", torch.bfloat16),
        "swin_b float16": lambda: swin("swin_b", torch.float16),
        "swin_l float32": lambda: swin("swin_l", torch.float32),
    }
    result: dict[str, Any] = {
        "machine": gpu_machine.about() | {"dimap": dimap.build_info()},
        "rows": [],
        "failed": {},
        "left out": [],
    }
    for name, case in cases.items():
        if time.monotonic() - start > arguments.seconds:
            result["left out"].append(name)
            print(f"{name}: left out, no time")
        else:
            try:
                row = case()
                result["rows"].append(row)
                print(f"{name}: {json.dumps(row)}", flush=True)
            except Exception as error:  # the next row may still tell something
                traceback.print_exc()
                result["failed"][name] = f"{type(error).__name__}: {error}"[:500]
            torch.cuda.empty_cache()
        result["targets"] = targets(result["rows"])
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'target':<56}{'came':>8}{'reach':>8}{'aim':>8}")
    for t in result["targets"]:
        print(f"{t['job']:<56}{t['value']:>8.3g}{t['reach']:>8g}{t['aim']:>8g}")
    wrong = [r for r in result["rows"] if False in (v for v in r.values() if isinstance(v, bool))]
    if result["failed"] or wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
