"""docs/architecture.md names every file of the package, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
TOLD = {path.rsplit("/")[-1] for path in re.findall(r"`([\w./]+?)(?:\.pyi?)?`", TEXT)}
EACH = {
    "cli",
    "plots",
    "integrations",
}  # a file for each command, picture, library: their row says so
FILES = sorted((ROOT / "python/dimap").rglob("*.py"))


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if not p.stem.startswith("__") and p.parent.name not in EACH],
    ids=lambda p: p.stem,
)
def test_every_file_is_told(path: Path):
    assert path.stem in TOLD


def test_every_file_that_is_told_is_there():
    names = {
        p.name
        for folder in ("csrc", "python", "tests", "cmake", "docs")
        for p in (ROOT / folder).rglob("*")
    }
    told = re.findall(r"`[\w./]*?(\w+\.(?:cpp|cuh?|h|py|cmake))`", TEXT)
    assert len(told) > 50
    assert [name for name in told if name not in names] == []
