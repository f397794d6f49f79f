"""Budgets and limits of files: what `dimap.prune` makes of the loaded weights, bit by bit."""

from __future__ import annotations

import copy

import dimap
import pytest
import timm
import torch
from checkpoints import DTYPES, assert_same, vit
from dimap.checkpoint.bitmask import lay_out, size_at_most
from dimap.checkpoint.header import DTYPES as KINDS
from dimap.checkpoint.header import make_header
from dimap.stream import prune_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

NAME = "test_vit"  # timm's smallest


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME)


CASES = [
    {"flops": 0.6},
    {"flops": 0.6, "scope": "global", "min_keep": 0.3},
    {"nominal_flops": 0.5, "max_keep": 0.9},
    {"flops": 0.6, "params": 0.5, "sparsity": "auto"},
    {"sparsity": 0.5, "limits": {"blocks.0.*": (0.7, 1), "proj": (0.1, 0.52)}},
    {"params": 0.5, "sparsity": {"qkv": 0.25}, "normalize": "block"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("safetensors", dtype) for dtype in DTYPES.values()]
    + [("pth", torch.bfloat16)]
    + [pytest.param("pth", t, marks=pytest.mark.large) for t in (torch.float32, torch.float16)],
    ids=str,
)
def test_files_are_pruned_as_in_memory(tmp_path, model, form, dtype, options):
    whole = copy.deepcopy(model).to(dtype)
    source, out = (tmp_path / f"{name}.{form}" for name in ("in", "out"))
    write, read = (save_file, load_file) if form == "safetensors" else (torch.save, torch.load)
    write(whole.state_dict(), source)
    done = prune_checkpoint(source, out, model=NAME, **options)
    pruning = dimap.prune(whole, **options)
    assert_same(read(out), whole.state_dict())
    assert done.sparsity == pruning.sparsity
    assert repr(done.thresholds) == repr(pruning.thresholds)
    got, want = done.summary(), pruning.report(whole)
    assert (got.asked, got.got, got.flops) == (want.asked, want.got, want.flops)
    for name in ("flops", "nominal_flops", "params"):
        assert got.got.get(name, 0) <= options.get(name, 1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_file_is_as_large_as_asked_for_and_hardly_smaller(tmp_path, dtype, share):
    save_file(vit(dtype, width=64), tmp_path / "in.safetensors")
    size = int(share * (tmp_path / "in.safetensors").stat().st_size)
    done = prune_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", size=size, format="bitmask"
    )
    got = (tmp_path / "out.safetensors").stat().st_size
    assert size - 200 < got <= size
    assert done.summary().got == {"size": got}


def test_what_no_file_can_be(tmp_path):
    save_file(vit(), tmp_path / "in.safetensors")
    where = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(
        ValueError, match=r"size must be at least .* all is pruned that may be, got 10"
    ):
        prune_checkpoint(*where, size=10, format="bitmask")
    with pytest.raises(ValueError, match="size is for a safetensors checkpoint written as bitmask"):
        prune_checkpoint(*where, size=10_000)
    with pytest.raises(
        ValueError, match="IN does not say which model it is: give --model timm:NAME"
    ):
        prune_checkpoint(*where, flops=0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(["F32", "BF16", "U8"]), shapes), min_size=1, max_size=5),
    st.data(),
)
def test_the_size_that_is_planned_with_is_enough_and_grows(tensors, data):
    described = [(f"t{i}", KINDS[code], shape) for i, (code, shape) in enumerate(tensors)]
    dense = make_header(described, {"format": "pt"}, "a file")
    counts, more = {}, {}
    for entry in dense.entries:
        if entry.dtype.code != "U8":
            counts[entry.name] = data.draw(st.integers(0, entry.numel()))
            more[entry.name] = data.draw(st.integers(counts[entry.name], entry.numel()))
    planned = size_at_most(dense, counts, "a file")
    assert lay_out(dense, counts, "a file").header.file_size <= planned
    assert planned <= size_at_most(dense, more, "a file")
