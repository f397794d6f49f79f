"""The paper's protocol from end to end, on random data with a micro model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper"
DOCS = PAPER.parents[1] / "docs"


def script(name: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, str(PAPER / name), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the protocol has run once."""
    folder = tmp_path_factory.mktemp("paper")
    script("run.py", *ARGUMENTS, "--out", "out", "--jobs", 2, folder=folder)
    return folder


ARGUMENTS = ("--micro", "--data", "random", "--cache", "cache", "--device", "cpu")


def results(folder: Path, out: str = "out") -> dict:
    return json.loads((folder / out / "micro.json").read_text())


def test_every_cell_is_there(folder: Path) -> None:
    cells = results(folder)["cells"]
    trained = [c for c in cells if c["kind"] == "train"]
    assert [c["seed"] for c in trained] == [0, 1]
    for seed in (0, 1):
        mine = {
            (c["method"], c.get("scope"), c["ratio"]): c
            for c in cells
            if c["kind"] == "prune" and c["seed"] == seed
        }
        methods = ("dimap", "lamp", "uniform", "global_magnitude", "taylor", "snip")
        want = {("dense", None, 0.0)}
        want |= {(m, None, r) for m in methods for r in (0.5, 0.9)}
        want |= {("dimap", s, r) for s in ("type", "stage", "block") for r in (0.5, 0.9)}
        assert mine.keys() == want
        assert all(("tuned" in c) == (s is None or r == 0.5) for (_, s, r), c in mine.items())
        kept = mine["dimap", None, 0.9]["kept"]
        assert kept == pytest.approx(dict.fromkeys(("qkv", "proj", "mlp"), 0.1), abs=0.02)


def test_a_second_run_uses_what_is_cached_and_repeats_the_rest(folder: Path) -> None:
    cache = sorted((folder / "cache").glob("*.json"))
    redone = next(p for p in cache if "prune" in p.name)
    kept = {p: p.stat().st_mtime_ns for p in cache if p != redone}
    redone.unlink()
    script("run.py", *ARGUMENTS, "--out", "again", "--jobs", 1, folder=folder)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    times = ("seconds", "cpu_seconds")
    first, second = (
        [{k: v for k, v in c.items() if k not in times} for c in results(folder, out)["cells"]]
        for out in ("out", "again")
    )
    assert first == second


def test_the_report_fills_the_page(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    page = folder / "results.md"
    page.write_text((DOCS / "results.md").read_text())
    script("report.py", "out/micro.json", "--page", page, "--images", "images", folder=folder)
    text = page.read_text()
    assert "| weights removed | 50 % | 90 % |" in text
    assert "| less `lamp` |" in text
    for name in ("paper-accuracy.png", "paper-scopes.png"):
        assert (folder / "images" / name).stat().st_size > 5000


def test_ahead_needs_every_seed() -> None:
    sys.path.insert(0, str(PAPER))
    try:
        from report import paired
    finally:
        sys.path.remove(str(PAPER))
    assert paired({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.0, 1: 1.0, 2: 1.0})[2]
    assert not paired({0: 2.0, 1: 2.1, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0})[2]
    mean, error, ahead = paired({0: 1.1, 1: 3.0, 2: 1.2}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (round(mean, 2), round(error, 2), ahead) == (0.77, 0.62, False)
