"""The engine's benchmark runs, on small sizes, and shows every part and every distribution."""

from __future__ import annotations

import os
import subprocess
import sys

import harness
import pytest
from distributions import DISTRIBUTIONS


def test_every_part() -> None:
    pytest.importorskip("timm")
    run = subprocess.run(
        [sys.executable, harness.RESULTS.parent / "bench_engine.py", "--quick"],
        env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    parts = [row[0].removeprefix("| ") for row in rows if row[1] == "job"]
    assert parts == ["distributions", "flatness", "threads", "model", "memory"]
    jobs = {(row[0].removeprefix("| "), row[1]) for row in rows}
    for name in DISTRIBUTIONS:
        for job in ("select", "prune_", "score"):
            assert ((name, job) in jobs) == (name != "normal")


def test_letting_go_of_a_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    class Result:
        def __del__(self) -> None:
            now[0] += 100

    def job() -> Result:
        now[0] += 1
        return Result()

    assert harness.time_in_turns({"job": job}, 3) == {"job": 1}
