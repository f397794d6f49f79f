"""select and prune_ beside a copy of the weights, plain PyTorch and torch.nn.utils.prune.

    python benchmarks/bench_select.py [--shapes swin_b] [--threads 2] [--save] [--quick]

Prints nanoseconds per weight and ratios; --save writes benchmarks/results/select.json.
"""

from __future__ import annotations

import argparse

import harness
import torch
from dimap import ops
from dimap.bench import plain, shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure(name: str, dtype: torch.dtype, scope: str, repeats: int, slow: bool) -> dict:
    """One row: seconds of every job on the same weights, and extra memory."""
    weights, layers, modules, keep = shapes.problem(name, dtype, scope)
    n = sum(w.numel() for w in weights)
    target = [torch.empty_like(w) for w in weights]

    def copy() -> None:
        for t, w in zip(target, weights, strict=True):
            t.copy_(w)

    jobs = {
        "copy": copy,
        "select": lambda: ops.select(weights, layers, modules, keep),
        "prune_": lambda: ops.prune_(target, layers, modules, keep),
    }
    times = {"copy": repeats, "select": repeats, "prune_": repeats}
    if slow:
        jobs["plain PyTorch"] = lambda: plain.select(weights, modules, keep)
        jobs["global_unstructured"] = lambda: plain.global_unstructured(weights, 0.55)
        times |= {"plain PyTorch": 1, "global_unstructured": 1}
    seconds = harness.time_in_turns(jobs, times, prepare={"prune_": copy})
    copy()
    outputs = n  # bytes of masks
    return {
        "shapes": name,
        "dtype": str(dtype).removeprefix("torch."),
        "scope": scope,
        "weights": n,
        "tensors": len(weights),
        "seconds": seconds,
        "extra_bytes": {
            "select": harness.peak_extra(jobs["select"]) - outputs,
            "prune_": harness.peak_extra(jobs["prune_"]),
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
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/select.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": harness.machine(), "rows": []}
    cases = [(args.shapes, "float32", scope) for scope in ("module", "global", "layer")]
    cases += [
        (args.shapes, "bfloat16", "module"),
        (args.shapes, "float16", "module"),
        ("swin_t", "float32", "module"),
    ]
    print(
        f"{'':32}{'copy':>8}{'select':>16}{'prune_':>16}{'plain':>16}{'torch prune':>16}   extra memory"
    )
    for name, dtype, scope in cases:
        slow = not args.quick and scope == "module" and name == args.shapes
        row = measure(name, DTYPES[dtype], scope, 5 if args.quick else 15, slow)
        result["rows"].append(row)
        s, n = row["seconds"], row["weights"]
        cells = "".join(
            f"{s[j] / n * 1e9:8.3f}" + (f" {s[j] / s['copy']:5.1f} x" if j != "copy" else "")
            if j in s
            else " " * 16
            for j in ("copy", "select", "prune_", "plain PyTorch", "global_unstructured")
        )
        extra = row["extra_bytes"]
        print(
            f"{name} {dtype} {scope}".ljust(32)
            + cells
            + f"   {extra['select'] / extra['weights']:.1%}",
            flush=True,
        )
    # The same with one thread: what the second one brings, beside what it brings a copy.
    torch.set_num_threads(1)
    row = measure(args.shapes, torch.float32, "module", 5 if args.quick else 9, False)
    result["one_thread"] = row
    two, one = result["rows"][0]["seconds"], row["seconds"]
    print(
        "threads gain: "
        + ", ".join(f"{j} {one[j] / two[j]:.2f}x" for j in ("copy", "select", "prune_"))
    )
    if args.save:
        harness.save("select", result)


if __name__ == "__main__":
    main()
