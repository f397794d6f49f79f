"""Every CUDA operator on small inputs that take every path: what compute-sanitizer looks at.

    python benchmarks/gpu_small.py [--graph | --profile FILE]

Checks masks and scores against the CPU's. --graph: captures select and score in a graph and replays it on new weights.
--profile: how long each kernel of a select and a score of 64 M weights takes, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from dimap import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_of(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(40_001,), (7, 300), (0,), (), (3, 20_000)]
    normal = [torch.randn(s, generator=generator) for s in shapes]
    return [
        (w * 2).round() if i == 4 else w
        for i, w in enumerate(w.to(d) for d in DTYPES for w in normal)
    ]


def check_scores(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Either may be an ulp off."""
    for a, b in zip(got, want, strict=True):
        ulps = (a.cpu().contiguous().view(torch.int32) - b.contiguous().view(torch.int32)).abs()
        assert not a.numel() or int(ulps.max()) <= 2


def profile(path: Path) -> None:
    """Microseconds of each kernel, the mean of three calls."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(4096, 1024, device="cuda").to(dtype) for _ in range(16)]
        n = 16 * 4096 * 1024
        jobs = {
            "select": lambda w=weights, n=n: torch.ops.dimap.select(
                w, list(range(16)), [0] * 16, [n // 2]
            ),
            "score": lambda w=weights: torch.ops.dimap.score(w, list(range(16))),
        }
        for name, job in jobs.items():
            job()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
                for _ in range(3):
                    job()
                torch.cuda.synchronize()
            found[f"{name} {dtype}, {n} weights"] = {
                event.key: {"launches": event.count / 3, "us": event.device_time_total / 3}
                for event in run.key_averages()
            }
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    if "--profile" in sys.argv:
        profile(Path(sys.argv[sys.argv.index("--profile") + 1]))
        return
    weights = weights_of(0)
    layers = list(range(len(weights)))
    modules = [i % 2 for i in layers]
    totals = [
        sum(w.numel() for w, m in zip(weights, modules, strict=True) if m == k) for k in (0, 1)
    ]
    keep = [round(0.45 * n) for n in totals]
    want = ops.select(weights, layers, modules, keep)
    there = [w.cuda() for w in weights]
    if "--graph" in sys.argv:
        torch.ops.dimap.select(there, layers, modules, keep)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            masks = torch.ops.dimap.select(there, layers, modules, keep)
            scores = torch.ops.dimap.score(there, layers)
        for seed in (1, 2):
            fresh = weights_of(seed)
            for w, new in zip(there, fresh, strict=True):
                w.copy_(new)
            graph.replay()
            for got, mask in zip(masks, ops.select(fresh, layers, modules, keep), strict=True):
                assert torch.equal(got.cpu(), mask)
            check_scores(scores, ops.score(fresh, layers))
        print("graph replay decides anew: ok")
        return
    for got, mask in zip(ops.select(there, layers, modules, keep), want, strict=True):
        assert torch.equal(got.cpu(), mask)
    check_scores(ops.score(there, layers), ops.score(weights, layers))
    many = [
        torch.randn(2_000_000, generator=torch.Generator().manual_seed(1)).cuda()
    ]  # in several buckets
    check_scores(ops.score(many, [0]), ops.score([many[0].cpu()], [0]))
    windows = ops.first_windows([w.dtype for w in weights], 4096).cuda()
    table = ops.survey(there, layers, windows, 4096)
    ops.solve(table, windows, modules, keep)
    odd = there[0][1:]  # starts between vectors
    assert int(ops.select([odd], [0], [0], [9_000])[0].sum()) == 9_000
    torch.ops.dimap.prune_(there, layers, modules, keep)
    for got, w, mask in zip(there, weights, want, strict=True):
        assert torch.equal(got.cpu(), torch.where(mask, w, torch.zeros_like(w)))
    bad = torch.ones(50_000)
    bad[49_999] = float("nan")
    masks, thresholds = torch.ops.dimap.select_cuts([bad.cuda()], [0], [0], [10])
    assert thresholds.tolist() == [-1.0]
    assert not bool(masks[0].any())
    print("all operators: ok")


if __name__ == "__main__":
    main()
