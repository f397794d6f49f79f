"""score beside a copy of the weights and plain PyTorch (sort, cumsum, divide, scatter).

    python benchmarks/bench_score.py [--shapes swin_b] [--threads 2] [--save] [--quick]

Prints nanoseconds per weight and ratios; --save writes benchmarks/results/score.json.
"""

from __future__ import annotations

import argparse

import harness
import torch
from dimap import ops
from dimap.bench import plain, shapes


def measure(name: str, dtype: torch.dtype, repeats: int, slow: bool) -> dict:
    """One row: seconds of every job on the same weights, and extra memory."""
    weights, layers, _, _ = shapes.problem(name, dtype)
    n = sum(w.numel() for w in weights)
    target = [torch.empty_like(w) for w in weights]
    jobs = {
        "copy": lambda: [t.copy_(w) for t, w in zip(target, weights, strict=True)],
        "score": lambda: ops.score(weights, layers),
    }
    times = {"copy": repeats, "score": repeats}
    if slow:
        jobs["plain PyTorch"] = lambda: plain.score(weights)
        times["plain PyTorch"] = 1
    return {
        "shapes": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": n,
        "tensors": len(weights),
        "largest_layer": max(w.numel() for w in weights),
        "seconds": harness.time_in_turns(jobs, times),
        "extra_bytes": {
            "score": harness.peak_extra(jobs["score"]) - 4 * n,
            "weights": n * dtype.itemsize,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="swin_b", choices=shapes.CONFIGS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no slow yardsticks")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/score.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": harness.machine(), "rows": []}
    print(
        f"{'':24}{'copy':>8}{'score':>18}{'plain':>18}   plain / score   extra bytes a weight of the largest layer"
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = measure(args.shapes, dtype, 3 if args.quick else 7, not args.quick)
        result["rows"].append(row)
        s, n = row["seconds"], row["weights"]
        cells = "".join(
            f"{s[j] / n * 1e9:8.3f}" + (f" {s[j] / s['copy']:7.1f} x" if j != "copy" else "")
            if j in s
            else " " * 18
            for j in ("copy", "score", "plain PyTorch")
        )
        ratio = f"{s['plain PyTorch'] / s['score']:.1f} x" if "plain PyTorch" in s else ""
        extra = row["extra_bytes"]["score"] / row["largest_layer"]
        print(
            f"{args.shapes} {row['dtype']}".ljust(24) + cells + f"   {ratio:>13}   {extra:.1f}",
            flush=True,
        )
    if args.save:
        harness.save("score", result)


if __name__ == "__main__":
    main()
