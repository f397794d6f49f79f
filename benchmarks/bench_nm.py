"""select_nm and nm_ beside a copy of the same weights, as ratios.

    python benchmarks/bench_nm.py [--shapes swin_b] [--threads 2] [--rounds 15] [--save]

A ratio is the median of the rounds' ratios; in brackets the tenth and the ninetieth percentile.
--save writes benchmarks/results/nm.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import harness
import torch
from dimap import ops, reference
from dimap.bench import shapes
from dimap.bench.timing import time_in_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [(2, 4, -1), (1, 4, -1), (4, 8, -1), (8, 16, -1), (2, 4, 0)]


def measure(
    name: str, dtype: torch.dtype, cases: Sequence[tuple[int, int, int]], rounds: int
) -> list[dict[str, Any]]:
    weights = shapes.problem(name, dtype)[0]
    target = [w.clone() for w in weights]

    def copy() -> None:
        for t, w in zip(target, weights, strict=True):
            t.copy_(w)

    rows = []
    for n, m, dim in cases:
        [mask], [want] = (f(weights[:1], n, m, dim) for f in (ops.select_nm, reference.select_nm))
        assert torch.equal(mask, want)
        jobs = {
            "copy": copy,
            "select_nm": lambda n=n, m=m, dim=dim: ops.select_nm(weights, n, m, dim),
            "nm_": lambda n=n, m=m, dim=dim: ops.nm_(target, n, m, dim),
        }
        found = time_in_turns(jobs, rounds, prepare={"nm_": copy})
        row = {
            "shapes": name,
            "dtype": str(dtype).removeprefix("torch."),
            "nm": f"{n}:{m}",
            "dim": dim,
        }
        row["beside_copy"] = {job: found[job].beside(found["copy"]) for job in ("select_nm", "nm_")}
        told = ", ".join(
            f"{job} {a:.2f} ({b:.2f} to {c:.2f})" for job, (a, b, c) in row["beside_copy"].items()
        )
        print(f"{name} {row['dtype']:9} {row['nm']:>5} along {dim:2}: {told}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="swin_b", choices=shapes.CONFIGS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/nm.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = harness.machine()
    rows = [r for t in DTYPES.values() for r in measure(args.shapes, t, CASES, args.rounds)]
    if args.save:
        harness.save("nm", {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
