"""Checkpoints that compressed-tensors wrote as `sparse-bitmask`, made dense."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import runner
from dimap.bitmask import expand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from checkpoints import DTYPES, assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
ALL = DTYPES | {"float64": torch.float64, "float8": torch.float8_e4m3fn}


def packed(name, weights):
    """What the library's compressor makes of a tensor."""
    mask = weights.float() != 0
    counts = mask.sum(-1)
    raw = weights.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.itemsize]
    )
    return {
        f"{name}.shape": torch.tensor(weights.shape),
        f"{name}.compressed": raw[mask].view(weights.dtype),
        f"{name}.bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        f"{name}.row_offsets": torch.cumsum(counts, 0) - counts,
    }


def sparse(*shape, dtype=torch.float32, seed=0, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator)
    weights[torch.rand(shape, generator=generator) >= density] = 0
    weights = weights.to(dtype).to(
        torch.float64
    )  # small ones may have become zeros, negative ones too
    weights[weights == 0] = 0.0  # of which the library makes positive ones
    return weights.to(dtype)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(sorted(ALL)),
    st.integers(0, 20),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
)
def test_it_comes_back_bit_by_bit(tmp_path, dtype, rows, columns, density, whole):
    state = {"a.weight": sparse(rows, columns, dtype=ALL[dtype], density=density)}
    state["b.weight"] = sparse(3, 16, seed=1)
    stored = {"norm.bias": torch.ones(3), "ids": torch.arange(5)}
    for name, tensor in state.items():
        stored |= packed(name if whole else name.removesuffix(".weight"), tensor)
    save_file(stored, tmp_path / "in.safetensors", {"format": "pt"})
    expand(tmp_path / "in.safetensors", tmp_path / "out.safetensors", force=True)
    state |= {n: stored[n] for n in ("norm.bias", "ids")}
    assert_same(load_file(tmp_path / "out.safetensors"), state)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "shape", [(1 << 10, 1 << 11), (700, 3001), (5,), (3, 4, 9), (1, 1)], ids=str
)
def test_shapes(tmp_path, shape):
    weights = sparse(*shape, dtype=torch.bfloat16)
    save_file(packed("x", weights), tmp_path / "in.safetensors")
    expand(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"x.weight": weights})


CONFIGS = {
    "sparse": (
        {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}},
        {},
    ),
    "earlier": ({"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}}, {}),
    "quantized too": (
        {"quantization_config": {"config_groups": {"a": {}}, "sparsity_config": {"format": "sparse-bitmask"}}},
        {"quantization_config": {"config_groups": {"a": {}}}},
    ),
    "none": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_whose_parts_lie_in_several_shards(tmp_path, case):
    config, after = CONFIGS[case]
    state = {f"layers.{i}.fc.weight": sparse(24, 33 - i, seed=i) for i in range(3)}
    stored = {}
    for name, tensor in state.items():
        stored |= packed(name.removesuffix(".weight"), tensor)
    stored["head.weight"] = state["head.weight"] = torch.ones(2, 2)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    names, weight_map = list(stored), {}
    for number in range(3):  # parts of one tensor in each of them
        file = f"model-{number + 1:05}-of-00003.safetensors"
        mine = names[number::3]
        save_file({n: stored[n] for n in mine}, source / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 7, "more": "kept"}, "weight_map": weight_map}
    (source / INDEX).write_text(json.dumps(index))
    (source / "config.json").write_text(json.dumps({"model_type": "x"} | config))
    (source / "config.json").chmod(0o444)
    expand(source, out)
    found, home = {}, {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
        home |= dict.fromkeys(load_file(file), file.name)
    assert_same({n: found[n] for n in state}, state)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == home
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in state.values()),
        "more": "kept",
    }
    assert json.loads((out / "config.json").read_text()) == {"model_type": "x"} | after


BAD = {
    "another bit": (lambda s: s["w.bitmask"].__setitem__((0, 0), s["w.bitmask"][0, 0] ^ 8), "as many values as its bits say"),
    "unused bits": (
        lambda s: (s["w.bitmask"].__setitem__((0, 1), 0xF0), s.update({"w.row_offsets": torch.tensor([0, 7, 11])})),
        "w.compressed must .*",
    ),
    "other rows": (lambda s: s["w.row_offsets"].__setitem__(1, 2), "w.row_offsets must be where the values of each row begin"),
    "a row too few": (lambda s: s.update({"w.row_offsets": s["w.row_offsets"][:2]}), "w.row_offsets must be int64 \\[3\\] for shape \\[3, 12\\]"),
    "another shape": (lambda s: s["w.shape"].copy_(torch.tensor([3, 17])), "w.bitmask must be uint8 \\[3, 3\\] for shape"),
    "a huge shape": (lambda s: s["w.shape"].copy_(torch.tensor([1 << 60, 12])), "w.bitmask must be uint8"),
    "a negative shape": (lambda s: s["w.shape"].copy_(torch.tensor([3, -12])), "w.bitmask must be uint8"),
    "no shape": (lambda s: s.update({"w.shape": torch.zeros(0, dtype=torch.int64)}), "w.shape must be sizes"),
    "a long shape": (lambda s: s.update({"w.shape": torch.ones(100, dtype=torch.int64)}), "w.shape must be sizes"),
    "a shape of floats": (lambda s: s.update({"w.shape": torch.ones(2)}), "w.shape must be sizes"),
    "bits of another type": (lambda s: s.update({"w.bitmask": s["w.bitmask"].to(torch.int8)}), "w.bitmask must be uint8"),
    "a value too few": (lambda s: s.update({"w.compressed": s["w.compressed"][1:].clone()}), "as many values as its bits say"),
    "values in two dimensions": (lambda s: s.update({"w.compressed": s["w.compressed"][None].clone()}), "in one dimension"),
    "two spellings of a name": (lambda s: s.update(packed("w.weight", sparse(2, 8))), "must hold w.weight once"),
    "dense as well": (lambda s: s.update({"w.weight": torch.ones(1)}), "must hold w.weight once"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(tmp_path, case):
    edit, message = BAD[case]
    state = packed("w", sparse(3, 12))
    edit(state)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=message):
        expand(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_unused_bits_are_refused_even_where_all_else_fits(tmp_path):
    state = packed("w", torch.eye(3, 12))
    state["w.bitmask"][2] = torch.tensor([0, 0x80], dtype=torch.uint8)
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"w\.compressed must have zeros in the unused bits"):
        expand(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = sparse(8, 24)
    save_file(packed("w", weights), "in.safetensors")
    run = runner(capsys)
    code, _, err = run("prune", "in.safetensors", "out.safetensors", "-s", 0.5)
    assert code == 1
    assert "`dimap expand` makes it dense" in err
    assert "`dimap expand` gives the dense one" in run("inspect", "in.safetensors")[1]
    assert run("expand", "in.safetensors", "out.safetensors")[0] == 0
    assert_same(load_file("out.safetensors"), {"w.weight": weights})
