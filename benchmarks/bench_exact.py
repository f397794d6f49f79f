"""How many weights plain PyTorch decides otherwise than exact arithmetic does.

    python benchmarks/bench_exact.py [--shapes swin_b] [--save]

The exact masks are those of dimap, which the tests compare with the specification. --save writes
benchmarks/results/exact.json.
"""

from __future__ import annotations

import argparse

import harness
import torch
from dimap import ops
from dimap.bench import plain, shapes


def measure(name: str, dtype: torch.dtype) -> dict:
    """One row: weights, and those on which the masks of plain PyTorch and of dimap differ."""
    weights, layers, modules, keep = shapes.problem(name, dtype)
    masks = zip(
        plain.select(weights, modules, keep),
        ops.select(weights, layers, modules, keep),
        strict=True,
    )
    return {
        "shapes": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": sum(w.numel() for w in weights),
        "plain PyTorch decides otherwise": sum(int((a != b).sum()) for a, b in masks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="swin_b", choices=shapes.CONFIGS)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rows = [measure(args.shapes, dtype) for dtype in dtypes]
    print(*rows, sep="\n")
    if args.save:
        harness.save("exact", {"machine": harness.machine(), "rows": rows})


if __name__ == "__main__":
    main()
