"""The CUDA engine's solver, compiled for the host: its logic needs no GPU to be tested."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_device_solver_cuts_exactly_on_the_host(tmp_path: Path) -> None:
    program = tmp_path / "solver_host"
    source = ROOT / "tests" / "cuda" / "solver_host.cpp"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    assert COMPILER is not None
    subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], check=True, timeout=120)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("ok")
