"""Pruning safetensors files as they stream by: bit by bit what `dimap.prune` makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import dimap
import numpy as np
import pytest
import torch
from checkpoints import CASES, DTYPES, assert_same, bits, load_folder, shards, vit
from dimap.checkpoint import streaming

pytest.importorskip("safetensors")

from dimap.stream import prune_checkpoint
from safetensors.torch import load_file, save_file


def check(path, state, out, sparsity, **options):
    """Stream `path` to `out`; compare with the in-memory result. Returns both prunings."""
    want = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(want, sparsity, **options)
    masks = out.with_name("masks.safetensors")
    streamed = prune_checkpoint(path, out, sparsity, masks=masks, force=True, **options)
    assert_same(load_file(out), want)
    assert_same({n: m.view(torch.uint8) for n, m in dimap.load_masks(masks).items()},
                {n: m.view(torch.uint8) for n, m in pruning.masks.items()})  # fmt: skip
    assert repr(streamed.thresholds) == repr(pruning.thresholds)
    assert list(streamed.modules) == list(pruning.modules)
    for name, layers in pruning.modules.items():
        assert name == "aux" or streamed.modules[name] == layers
    assert streamed.sparsity == pruning.sparsity
    assert streamed.kept == {n: int(m.sum()) for n, m in pruning.masks.items()}
    assert streamed.nonzero == pruning.nonzero
    for layer in pruning.report().layers:
        found = [streamed.smallest[p] for p in layer.parameters if p in streamed.smallest]
        assert min(found, default=None) == layer.smallest_kept, layer.name
    return streamed, pruning


@pytest.fixture(params=["1", "3"], ids=["one thread", "three threads"])
def threads(request, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", request.param)


@pytest.mark.parametrize(("sparsity", "options"), CASES)
@pytest.mark.parametrize("step", [0.0, 0.01], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_to_pruning_in_memory(tmp_path, threads, dtype, step, sparsity, options):
    state = vit(DTYPES[dtype], step=step)
    save_file(state, tmp_path / "in.safetensors")
    check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", sparsity, **options)


def test_header_metadata_and_offsets_are_kept(tmp_path):
    state = vit()
    save_file(state, tmp_path / "in.safetensors", {"format": "pt", "note": "kept ✓"})
    before = (tmp_path / "in.safetensors").read_bytes()
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5)
    assert (tmp_path / "in.safetensors").read_bytes() == before
    after = (tmp_path / "out.safetensors").read_bytes()
    length = 8 + int.from_bytes(before[:8], "little")
    assert after[:length] == before[:length]
    assert len(after) == len(before)


@pytest.mark.parametrize("step", [0.0, 0.01], ids=["distinct", "ties"])
def test_a_sharded_folder_keeps_shards_index_and_other_files(tmp_path, threads, step):
    state = vit(torch.bfloat16, step=step)
    source = shards(tmp_path / "in", state)
    linked = next(source.glob("*1-of*"))
    linked.rename(tmp_path / "blob")
    linked.symlink_to(tmp_path / "blob")
    blob = (tmp_path / "blob").read_bytes()
    want = {name: tensor.clone() for name, tensor in state.items()}
    dimap.prune(want, 0.55)
    prune_checkpoint(source, tmp_path / "out", 0.55)
    assert_same(load_folder(tmp_path / "out"), want)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in source.iterdir()
    )
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "blob").read_bytes() == blob


def raw_file(path, tensors):
    """A safetensors file with tensors in the order given and a header of any length."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        payload = bits(tensor).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(payload)]}  # fmt: skip
        data += payload
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("pad", range(5))
def test_unaligned_tensors_in_any_order(tmp_path, threads, pad):
    state = vit()
    state = {
        "a" * (pad + 1): torch.zeros(pad + 1, dtype=torch.uint8),
        **dict(reversed(state.items())),
    }
    raw_file(tmp_path / "in.safetensors", state)
    want = {n: t.clone() for n, t in vit().items()}
    dimap.prune(want, 0.55)
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.55)
    got = load_file(tmp_path / "out.safetensors")
    got.pop("a" * (pad + 1))
    assert_same(got, want)


def test_ties_go_to_the_plans_order_not_to_the_files(tmp_path, threads):
    state = {name: torch.ones_like(tensor) for name, tensor in vit(blocks=12).items()}
    raw_file(tmp_path / "in.safetensors", dict(sorted(state.items())))  # 10 and 11 before 2
    check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.55)


def test_weights_of_different_types_in_one_module(tmp_path, threads):
    state = vit()
    for i, name in enumerate(state):
        state[name] = state[name].to(list(DTYPES.values())[i % 3])
    save_file(state, tmp_path / "in.safetensors")
    for options in ({}, {"scope": "global"}, {"normalize": "module"}):
        check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.55, **options)


@pytest.mark.parametrize("weights", ["zero", "denormal", "huge", "one outlier", "pruned"])
def test_odd_distributions(tmp_path, weights):
    state = vit(seed=1)
    for tensor in state.values():
        if weights == "zero":
            tensor.zero_()
        elif weights == "denormal":
            tensor.mul_(1e-38)
        elif weights == "huge":
            tensor.mul_(1e38)
        elif weights == "one outlier":
            tensor.view(-1)[0] = 1e6
    if weights == "pruned":
        dimap.prune(state, 0.7)
    save_file(state, tmp_path / "in.safetensors")
    for sparsity in (0.2, 0.7, 0.71):
        check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", sparsity)


def test_one_reading_is_enough_where_the_guess_holds(tmp_path):
    for dtype in DTYPES.values():
        state = vit(dtype, width=64)
        save_file(state, tmp_path / "in.safetensors")
        streamed, _ = check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.55)
        assert streamed.readings == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_guess_costs_readings_only(tmp_path, dtype):
    """Large weights in one place that a sample of the file does not show as they are."""
    state = vit(DTYPES[dtype], width=256)
    for weights in state.values():
        if weights.ndim == 2:
            weights[:1] *= 4000
            weights[1:, ::2] = 0.5
    save_file(state, tmp_path / "in.safetensors")
    streamed, _ = check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.0)
    assert streamed.readings > 1


@pytest.mark.parametrize("step", [0.0, 0.01], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_can_be_set_aside(tmp_path, monkeypatch, dtype, step):
    monkeypatch.setattr(streaming, "ASIDE", 0)
    state = vit(DTYPES[dtype], step=step)
    save_file(state, tmp_path / "in.safetensors")
    check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.55)
    check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.5, scope="global")


def test_own_patterns(tmp_path):
    state = {
        f"w{i}": torch.randn(9, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)
    }
    save_file(state, tmp_path / "in.safetensors")
    patterns = {"even": r"w[02]", "odd": [(r"w1", r"w3")]}
    check(tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.4, patterns=patterns)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused_by_name_and_place(tmp_path, threads, value):
    state = vit(width=64)
    state["blocks.1.mlp.fc1.weight"].view(-1)[3000] = value
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp\.fc1\.weight must be finite, got .* 3000"
    ):
        prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_other_types_are_refused_by_name(tmp_path):
    state = vit()
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].double()
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight must be .*, got float64"):
        prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5)


def test_in_is_not_out_nor_inside(tmp_path):
    source = shards(tmp_path / "in", vit())
    for out in (source, source / "out", tmp_path):
        with pytest.raises(ValueError, match="the output must"):
            prune_checkpoint(source, out, 0.5, force=True)


def test_progress_counts_to_its_totals(tmp_path):
    save_file(vit(), tmp_path / "in.safetensors")
    steps = []

    class Progress:
        def step(self, description, total=None):
            steps.append([description, total, 0])

        def advance(self, amount):
            steps[-1][2] += amount

    prune_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5, progress=Progress()
    )
    assert [s[0] for s in steps] == ["reading", "writing"]
    assert all(total == done for _, total, done in steps)


MEMORY = """
import sys, dimap, dimap.stream
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
dimap.stream.prune_checkpoint(sys.argv[1], sys.argv[2], 0.55, patterns={"all": "w"})
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_a_tensor(tmp_path, dtype):
    """One tensor of 320 MB, more than what is allowed here."""
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.02
    part = torch.from_numpy(block).to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
    times = 320_000_000 // len(part)
    shape = [times, 1 << 20]
    entry = {"dtype": "F32" if dtype == "float32" else "BF16", "shape": shape,
             "data_offsets": [0, times * len(part)]}  # fmt: skip
    text = json.dumps({"w": entry}).encode()
    with open(tmp_path / "in.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(times):
            file.write(part)
    arguments = [tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, arguments)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert int(done.stdout) < 250


def test_the_report_is_that_of_the_weights_in_memory(tmp_path):
    state = vit()
    save_file(state, tmp_path / "in.safetensors")
    for options in ({}, {"scope": "layer"}, {"scope": "global", "normalize": "block"}):
        streamed, pruning = check(
            tmp_path / "in.safetensors", state, tmp_path / "out.safetensors", 0.55, **options
        )
        assert streamed.report() == pruning.report()
