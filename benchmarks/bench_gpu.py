"""select and score on a CUDA device, beside a copy of the weights and plain PyTorch, in one run.

    python benchmarks/bench_gpu.py [--quick] [--output benchmarks/results/gpu.json]

Medians of CUDA events; the inputs rotate among copies that together exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import dimap
import plain
import torch

ROOT = Path(__file__).resolve().parent.parent
SWIN_T = [(96, 2), (192, 2), (384, 6), (768, 2)]  # width and blocks of each stage


def swin_layers(scale: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Shapes and modules (qkv, proj, mlp) of a Swin's prunable weights, widths times `scale`."""
    shapes: list[tuple[int, int]] = []
    modules: list[int] = []
    for width, blocks in SWIN_T:
        c = width * scale
        for _ in range(blocks):
            shapes += [(3 * c, c), (c, c), (4 * c, c), (c, 4 * c)]
            modules += [0, 1, 2, 2]
    return shapes, modules


def time_ms(body: Callable[[int], object], repeats: int) -> float:
    for i in range(3):
        body(i)
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        body(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(name: str, scale: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    shapes, modules = swin_layers(scale)
    count = sum(a * b for a, b in shapes)
    copies = max(1, min(8, -(-(256 << 20) // (count * dtype.itemsize))))  # beyond any L2
    sets = [
        [torch.randn(s, device="cuda").mul_(0.02).to(dtype) for s in shapes] for _ in range(copies)
    ]
    totals = [
        sum(a * b for (a, b), m in zip(shapes, modules, strict=True) if m == k) for k in range(3)
    ]
    keep = [round(0.45 * n) for n in totals]
    layers = list(range(len(shapes)))
    pool = itertools.cycle(sets)
    flat = [torch.cat([w.flatten() for w in s]) for s in sets]
    copied = torch.empty_like(flat[0])
    result: dict[str, object] = {
        "case": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": count,
    }
    result["copy_ms"] = time_ms(lambda i: copied.copy_(flat[i % copies]), repeats)
    flat.clear()
    result["select_ms"] = time_ms(
        lambda i: torch.ops.dimap.select(next(pool), layers, modules, keep), repeats
    )
    result["score_ms"] = time_ms(lambda i: torch.ops.dimap.score(next(pool), layers), repeats)
    few = max(3, repeats // 10)
    result["plain_select_ms"] = time_ms(lambda i: plain.select(next(pool), modules, keep), few)
    result["plain_score_ms"] = time_ms(lambda i: plain.score(next(pool)), few)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = torch.ops.dimap.select(sets[0], layers, modules, keep)
    result["select_graph_ms"] = time_ms(lambda i: graph.replay(), repeats)
    assert sum(int(m.sum()) for m in masks) == sum(keep)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.ops.dimap.select(sets[0], layers, modules, keep)
    extra = torch.cuda.max_memory_allocated() - before - count
    result["select_extra_bytes"] = extra
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    repeats = 20 if arguments.quick else 100
    cases = [("swin-t", 1), ("swin-t x2", 2)] + ([] if arguments.quick else [("swin-t x4", 4)])
    rows = [
        measure(name, scale, dtype, repeats)
        for name, scale in cases
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    for r in rows:
        print(
            "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items())
        )
    if arguments.output:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
        about = {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit or None,
            "dimap": dimap.__version__,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
