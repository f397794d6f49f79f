"""Timing, memory and results for the benchmarks.

All yardsticks of a table are timed in one process, in turns, so that a ratio compares like with
like however fast the machine is at the moment. Times are medians.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dimap
import torch

RESULTS = Path(__file__).parent / "results"


def time_in_turns(
    jobs: dict[str, Callable[[], object]],
    repeats: dict[str, int] | int = 11,
    prepare: dict[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of each job: one warm-up, then round after round of all of them.

    The clock stops when the job returns: its result is let go of afterwards.
    prepare: what to do before a job, untimed.
    """
    prepare = prepare or {}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    wanted = {name: repeats if isinstance(repeats, int) else repeats[name] for name in jobs}
    for turn in range(max(wanted.values()) + 1):
        for name, job in jobs.items():
            if turn > wanted[name]:
                continue
            if name in prepare:
                prepare[name]()
            start = time.perf_counter()
            result = job()
            seconds = time.perf_counter() - start
            del result
            if turn or wanted[name] == 1:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_extra(job: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most while a job runs, its results included.

    Freed memory is handed back first: what the allocator keeps in stock would hide what is used.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
    before = _status("VmRSS")
    kept = job()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(name: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name + ":"))


def machine() -> dict[str, Any]:
    """What a result was measured on, and with."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent)
        return run.stdout.strip()

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dimap": dimap.build_info(),
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+" if git("status", "--porcelain", "-uno") else ""),
        "load_before": os.getloadavg()[0],
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}",
        file=sys.stderr,
    )
