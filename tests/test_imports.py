"""Every module can be the first of the package that is imported: no circle of imports stands in the way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import dimap
import pytest

FIRST = """
import importlib, os, sys, traceback
import torch  # once for all, since it takes long
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
"""
NEEDS = {"dimap.plots": "matplotlib", "dimap.finetuning": "timm", "dimap.cli": "typer"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_module_may_come_first():
    home = Path(dimap.__file__).parent
    files = sorted(p.relative_to(home.parent).with_suffix("") for p in home.rglob("*.py"))
    found = [".".join(f.parts[:-1] if f.name == "__init__" else f.parts) for f in files]
    missing = tuple(p for p, needed in NEEDS.items() if not importlib.util.find_spec(needed))
    names = [n for n in found if not n.startswith((*missing, "dimap.__main__"))]
    assert len(names) > 20
    done = subprocess.run([sys.executable, "-c", FIRST, *names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
