"""Every CUDA operator on small inputs that take every path: what compute-sanitizer looks at.

    python benchmarks/gpu_small.py [--graph]

Checks masks against the CPU's. --graph: captures select in a graph and replays it on new weights.
"""

from __future__ import annotations

import sys

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


def main() -> None:
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
        for seed in (1, 2):
            fresh = weights_of(seed)
            for w, new in zip(there, fresh, strict=True):
                w.copy_(new)
            graph.replay()
            for got, mask in zip(masks, ops.select(fresh, layers, modules, keep), strict=True):
                assert torch.equal(got.cpu(), mask)
        print("graph replay decides anew: ok")
        return
    for got, mask in zip(ops.select(there, layers, modules, keep), want, strict=True):
        assert torch.equal(got.cpu(), mask)
    ops.score(there, layers)
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
