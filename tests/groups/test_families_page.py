"""docs/families.md says what is true: a model of each row is built and grouped again."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("timm")
SCRIPT = Path(__file__).parents[2] / "docs" / "make_families.py"


def load():
    spec = importlib.util.spec_from_file_location("make_families", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = load()
PAGE = make.PAGE.read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading that begins so."""
    lines = PAGE[PAGE.index(f"## {title}") :].splitlines()[1:]
    end = next((i for i, line in enumerate(lines) if line.startswith("## ")), len(lines))
    cells = [line.strip("| ").split(" | ") for line in lines[:end] if line.startswith("| ")]
    return cells[1:]


TIMM = rows("timm")


def test_named_families_are_these():
    assert make.named() in PAGE


def test_the_readme_says_how_many():
    assert make.summary(PAGE) in make.README.read_text(encoding="utf-8")


def test_of_this_timm():
    if f"## timm {version('timm')}:" not in PAGE:
        pytest.skip("the page is of another timm: python docs/make_families.py")
    import timm

    listed = {name for *_, names in TIMM for name in names.split(", ")}
    assert listed <= set(timm.list_models())
    swin = {name for name in timm.list_models("swin*") if "mlp" not in name}
    assert swin <= listed


@pytest.mark.parametrize(("file", "said", "names"), TIMM, ids=[f"{f} {n[:30]}" for f, _, n in TIMM])
def test_a_model_of_every_row(file, said, names):
    if f"## timm {version('timm')}:" not in PAGE:
        pytest.skip("the page is of another timm: python docs/make_families.py")
    name = min(names.split(", "), key=len)
    ((found, _, shapes),) = make.of_timm([name])
    assert (found, make.verdict(shapes)) == (file, said)


def test_every_name_of_the_hierarchical_transformers_is_known():
    known = {
        name
        for _, said, names in TIMM
        if not said.startswith("refused")
        for name in names.split(", ")
    }
    import timm

    patterns = (
        "swin*", "pvt_v2*", "twins*", "mvitv2*", "coatn*", "maxvit*", "maxxvit*", "hiera*", "focalnet*",
        "efficientformer*", "davit*", "nest*", "gcvit*", "cait*", "xcit*", "samvit*", "eva02*", "deit*",
        "beit*", "caformer*", "tiny_vit*", "pit_*", "levit*", "coat_*", "volo*", "tnt*", "convit*",
    )  # fmt: skip
    for pattern in patterns:
        left = set(timm.list_models(pattern)) - known
        if version("timm") in PAGE:
            assert not left, pattern
