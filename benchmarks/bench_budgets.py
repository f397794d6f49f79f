"""What budgets and limits take beside a pruning to a given sparsity, in memory and streamed.

    python benchmarks/bench_budgets.py [--save] [--model swin_base_patch4_window7_224] [--repeats 5]

A budget is solved from surveys, each a reading of the weights that it still needs; then the weights are
pruned as ever. Times are medians of jobs that take turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import dimap
import timm
import torch
from dimap.stream import prune_checkpoint
from harness import machine, save, time_in_turns
from safetensors.torch import save_file

CASES = {
    "sparsity 0.55": {"sparsity": 0.55},
    "params 40 %": {"params": 0.4},
    "FLOPs 60 %": {"flops": 0.6},
    "nominal FLOPs 60 %": {"nominal_flops": 0.6},
    "sparsity 0.55, min-keep 40 %": {"sparsity": 0.55, "min_keep": 0.4},
    "FLOPs 60 %, auto": {"flops": 0.6, "sparsity": "auto"},
}
STREAMED = {
    "sparsity 0.55": {"sparsity": 0.55},
    "FLOPs 60 %": {"flops": 0.6},
    "size 50 %": {"format": "bitmask"},
    "sparsity 0.55, min-keep 40 %": {"sparsity": 0.55, "min_keep": 0.4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/budgets.json")
    parser.add_argument("--model", default="swin_base_patch4_window7_224")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = timm.create_model(options.model).to(dtype)
        rows += in_memory(model, dtype, options.repeats)
        with tempfile.TemporaryDirectory() as folder:
            rows += streamed(model, dtype, options, Path(folder))
    for row in rows:
        print(row)
    if options.save:
        save("budgets", {"machine": machine(), "model": options.model, "rows": rows})


def table(
    kind: str, dtype: torch.dtype, times: dict[str, float], told: dict[str, dict]
) -> list[dict]:
    one = times["sparsity 0.55"]
    return [
        {
            "where": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "job": name,
            "seconds": round(seconds, 4),
            "beside a sparsity": round(seconds / one, 2),
            **told[name],
        }
        for name, seconds in times.items()
    ]


def in_memory(model: torch.nn.Module, dtype: torch.dtype, repeats: int) -> list[dict]:
    jobs: dict[str, Callable[[], object]] = {}
    told: dict[str, dict] = {}
    for name, how in CASES.items():
        jobs[name] = lambda how=how: dimap.select(model, **how)
        pruned = copy.deepcopy(model)
        told[name] = {"got": dimap.prune(pruned, **how).report(pruned).got}
    return table("in memory: select", dtype, time_in_turns(jobs, repeats), told)


def streamed(
    model: torch.nn.Module, dtype: torch.dtype, options: argparse.Namespace, folder: Path
) -> list[dict]:
    source, out = folder / "in.safetensors", folder / "out.safetensors"
    save_file(model.state_dict(), source)
    size = source.stat().st_size // 2
    jobs: dict[str, Callable[[], object]] = {}
    told: dict[str, dict] = {}
    for name, how in STREAMED.items():
        given = {**how, **({"size": size} if "size" in name else {}), "model": options.model}
        jobs[name] = lambda given=given: prune_checkpoint(source, out, force=True, **given)
        done = prune_checkpoint(source, out, force=True, **given)
        told[name] = {"readings": done.readings, "got": done.summary().got}
        if "size" in name:
            told[name] |= {"asked": size}
    return table("streamed", dtype, time_in_turns(jobs, options.repeats), told)


if __name__ == "__main__":
    main()
