"""What the CPU engine must keep beside its speed: hard weights, any size, two threads, a whole model, memory.

    python benchmarks/bench_engine.py [--part distributions ...] [--threads 2] [--save] [--quick]

Prints a table for each part; --save writes benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence

import dimap
import harness
import torch
from dimap import ops
from dimap.bench import shapes
from distributions import DISTRIBUTIONS
from torch import Tensor

OPERATORS = ("select", "prune_", "score")
Rows = list[dict]


def keep_of(weights: Sequence[Tensor], sparsity: float = 0.55) -> list[int]:
    n = sum(w.numel() for w in weights)
    return [n - round(sparsity * n)]


def jobs_of(
    weights: list[Tensor], modules: list[int] | None = None, keep: list[int] | None = None
) -> tuple[dict[str, Callable[[], object]], Callable[[], None]]:
    """The operators and a copy as jobs, each tensor a layer; and what restores the weights for prune_."""
    layers = list(range(len(weights)))
    modules = modules or [0] * len(weights)
    keep = keep or keep_of(weights)
    target = [torch.empty_like(w) for w in weights]

    def copy() -> None:
        for t, w in zip(target, weights, strict=True):
            t.copy_(w)

    jobs: dict[str, Callable[[], object]] = {
        "copy": copy,
        "select": lambda: ops.select(weights, layers, modules, keep),
        "prune_": lambda: ops.prune_(target, layers, modules, keep),
        "score": lambda: ops.score(weights, layers),
    }
    return jobs, copy


def layers_of(n: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """count layers with n normal weights in all, cut from one block at places of their own."""
    size = n // count
    block = torch.randn(size + 4_096, generator=torch.Generator().manual_seed(0))
    return [
        (block[i * 37 % 4_096 :][:size] * 0.01 * 1.5 ** (i % 7)).to(dtype) for i in range(count)
    ]


def distributions(quick: bool) -> Rows:
    """Every hard distribution beside as many normal weights, in turns."""
    rows = []
    for name in DISTRIBUTIONS:
        if name == "normal":
            continue
        n = 300_000 if quick else 100_000_000 if "large" in name else 32_000_000
        hard = DISTRIBUTIONS[name](n)
        ordinary = DISTRIBUTIONS["normal"](n)
        pairs = {"hard": jobs_of(hard), "ordinary": jobs_of(ordinary)}
        jobs = {f"{op} {kind}": pairs[kind][0][op] for op in OPERATORS for kind in pairs}
        prepare = {f"prune_ {kind}": pairs[kind][1] for kind in pairs}
        seconds = harness.time_in_turns(jobs, 1 if quick else 5, prepare)
        for op in OPERATORS:
            hard_s, ordinary_s = seconds[f"{op} hard"], seconds[f"{op} ordinary"]
            rows.append(
                {
                    "distribution": name,
                    "job": op,
                    "weights": sum(w.numel() for w in hard),
                    "seconds": hard_s,
                    "ordinary_seconds": ordinary_s,
                    "measured": hard_s / ordinary_s,
                    "limit": 4.0,
                    "met": hard_s <= 4 * ordinary_s,
                }
            )
    return rows


def flatness(quick: bool) -> Rows:
    """Time a weight over sizes (layers of a million weights) and over numbers of tensors."""
    million = 10_000 if quick else 1_000_000
    series = {
        "10 M to 200 M float32": [
            (n * million, n, torch.float32) for n in (10, 30, 100, 200)[: 2 if quick else 4]
        ],
        "10 M to 1 G bfloat16": [
            (n * million, n, torch.bfloat16) for n in (10, 100, 1_000)[: 2 if quick else 3]
        ],
        "4 to 4,000 tensors float32": [
            (40 * million, count, torch.float32) for count in (4, 40, 400, 4_000)
        ],
        "4 to 4,000 tensors bfloat16": [
            (40 * million, count, torch.bfloat16) for count in (4, 40, 400, 4_000)
        ],
    }
    rows = []
    for name, cases in series.items():
        per_weight: dict[str, list[float]] = {op: [] for op in ("copy", *OPERATORS)}
        for n, count, dtype in cases:
            jobs, restore = jobs_of(layers_of(n, count, dtype))
            repeats = 1 if quick else 3 if n > 500 * million else 7
            seconds = harness.time_in_turns(jobs, repeats, {"prune_": restore})
            for op, s in seconds.items():
                per_weight[op].append(s / n * 1e9)
        for op, ns in per_weight.items():
            spread = (max(ns) - min(ns)) / (max(ns) + min(ns))
            rows.append(
                {
                    "series": name,
                    "job": op,
                    "cases": [{"weights": n, "tensors": count} for n, count, _ in cases],
                    "ns_per_weight": ns,
                    "measured": spread,
                    "limit": None if op == "copy" else 0.2,
                    "met": None if op == "copy" else spread <= 0.2,
                }
            )
    return rows


def threads(quick: bool) -> Rows:
    """One thread beside all: what the others bring, beside what they bring a copy."""
    name = "swin_t" if quick else "swin_b"
    weights, _, modules, keep = shapes.problem(name)
    jobs, restore = jobs_of(weights, modules, keep)
    count = torch.get_num_threads()
    both: dict[str, Callable[[], object]] = {}
    prepare: dict[str, Callable[[], object]] = {}

    def with_threads(n: int, op: str) -> None:
        if op == "prune_":
            restore()
        torch.set_num_threads(n)

    for op, job in jobs.items():
        for n in (1, count):
            both[f"{op} {n}"] = job
            prepare[f"{op} {n}"] = lambda n=n, op=op: with_threads(n, op)
    try:
        seconds = harness.time_in_turns(both, 1 if quick else 7, prepare)
    finally:
        torch.set_num_threads(count)
    gain = {op: seconds[f"{op} 1"] / seconds[f"{op} {count}"] for op in jobs}
    limit = min(1.7, gain["copy"])
    return [
        {
            "shapes": name,
            "job": op,
            "threads": count,
            "seconds_one": seconds[f"{op} 1"],
            "seconds": seconds[f"{op} {count}"],
            "measured": gain[op],
            "limit": None if op == "copy" else limit,
            "met": None if op == "copy" else gain[op] >= limit,
        }
        for op in jobs
    ]


def model(quick: bool) -> Rows:
    """dimap.prune of a whole Swin-T beside a copy of what it prunes."""
    if importlib.util.find_spec("timm") is None:
        print("\nmodel: needs timm, left out")
        return []
    import timm

    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch4_window7_224").eval()
    state = {name: p.detach() for name, p in net.named_parameters()}
    names = list(dimap.select(net, sparsity=0.55))
    source = {name: state[name].clone() for name in names}
    target = {name: state[name].clone() for name in names}

    def copy(to: dict[str, Tensor]) -> None:
        for name in names:
            to[name].copy_(source[name])

    rows = []
    for scope in ("module", "global", "layer")[: 1 if quick else 3]:
        seconds = harness.time_in_turns(
            {
                "copy": lambda: copy(target),
                "prune": lambda scope=scope: dimap.prune(net, sparsity=0.55, scope=scope),
            },
            1 if quick else 25,
            {"prune": lambda: copy(state)},
        )
        limit = 3 * seconds["copy"] + 5e-3
        rows.append(
            {
                "model": "swin_tiny_patch4_window7_224",
                "scope": scope,
                "weights": sum(w.numel() for w in source.values()),
                "copy_seconds": seconds["copy"],
                "measured": seconds["prune"],
                "limit": limit,
                "met": seconds["prune"] <= limit,
            }
        )
    return rows


def memory(quick: bool) -> Rows:
    """Memory beside the outputs: resident memory at its peak, less the outputs and what was there."""
    million = 10_000 if quick else 1_000_000
    swin = "swin_t" if quick else "swin_b"
    cases: dict[str, Callable[[], list[Tensor]]] = {
        f"{swin} float32": lambda: shapes.problem(swin)[0],
        f"{swin} bfloat16": lambda: shapes.problem(swin, torch.bfloat16)[0],
        "one layer of 100 M float32": lambda: layers_of(100 * million, 1, torch.float32),
        "1 G bfloat16 in 1,000 layers": lambda: layers_of(
            1_000 * million, 100 if quick else 1_000, torch.bfloat16
        ),
    }
    rows = []
    for name, make in cases.items():
        weights = make()
        n, size = sum(w.numel() for w in weights), weights[0].element_size()
        largest = sorted(w.numel() for w in weights)[-torch.get_num_threads() :]
        jobs, restore = jobs_of(weights)
        for op, outputs in (("select", n), ("prune_", 0), ("score", 4 * n)):
            restore()
            extra = harness.peak_extra(jobs[op]) - outputs
            limit = 12 * sum(largest) if op == "score" else round(0.03 * n * size) + 2**24
            rows.append(
                {
                    "case": name,
                    "job": op,
                    "weights": n,
                    "weights_bytes": n * size,
                    "largest_layers": largest,
                    "measured": extra,
                    "limit": limit,
                    "met": extra <= limit,
                }
            )
        del weights, jobs, restore
    return rows


PARTS: dict[str, Callable[[bool], Rows]] = {
    "distributions": distributions,
    "flatness": flatness,
    "threads": threads,
    "model": model,
    "memory": memory,
}


def show(part: str, rows: Rows) -> None:
    """A Markdown table of a part: what was measured, its limit, and whether it is met."""
    unit: dict[str, Callable[[float], str]] = {
        "distributions": lambda x: f"{x:.2f} ×",
        "flatness": lambda x: f"± {x:.0%}",
        "threads": lambda x: f"{x:.2f} ×",
        "model": lambda x: f"{x * 1e3:.1f} ms",
        "memory": lambda x: f"{x / 2**20:.1f} MiB",
    }
    print(f"\n| {part} | job | measured | limit | |\n|---|---|---|---|---|")
    for row in rows:
        label = next(
            row[k] for k in ("distribution", "series", "shapes", "scope", "case") if k in row
        )
        limit = "" if row["limit"] is None else unit[part](row["limit"])
        met = {None: "", True: "met", False: "**not met**"}[row["met"]]
        measured = unit[part](row["measured"])
        if "ns_per_weight" in row:
            measured += " (" + ", ".join(f"{ns:.2f}" for ns in row["ns_per_weight"]) + " ns)"
        print(f"| {label} | {row.get('job', 'prune')} | {measured} | {limit} | {met} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/engine.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict = {"machine": harness.machine(), "quick": args.quick}
    warm, _ = jobs_of(layers_of(100_000, 2, torch.float32))
    for job in warm.values():
        job()
    for part in args.part:
        result[part] = PARTS[part](args.quick)
        if args.quick:  # too small to judge by
            for row in result[part]:
                row["met"] = None
        show(part, result[part])
    if args.save:
        harness.save("engine", result)


if __name__ == "__main__":
    main()
