"""N:M from files to files: bit by bit what memory makes of it; which patterns a file has."""

from __future__ import annotations

import json

import dimap
import numpy as np
import pytest
import torch
from checkpoints import DTYPES, assert_same, load_folder, shards, vit
from commands import runner
from dimap import _C
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.base import Silent
from dimap.checkpoint.inspect import inspect
from dimap.pruning import most_in_groups
from dimap.stream import prune_checkpoint
from safetensors.torch import load_file, save_file

IN, OUT, MASKS = "in.safetensors", "out.safetensors", "masks.safetensors"
CASES = [("2:4", None, {}), ("5:8", None, {}), ("1:16", None, {}), ("4:4", None, {})]
CASES += [("auto", 0.5, {}), ("auto:8", 0.7, {"scope": "global"})]
CASES += [("auto:2", {"qkv": 0.2, "proj": 1.0, "mlp": 0.0}, {})]


def gpt2(width=48, blocks=2, dtype=torch.float32):
    """Of Conv1D, [in, out], with ties and zeros; rows of c_fc and c_attn are no multiple of a vector."""
    generator = torch.Generator().manual_seed(0)
    state = {"wte.weight": torch.randn(12, width), "wpe.weight": torch.randn(8, width)}
    sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (width, 4 * width + 3), "mlp.c_proj": (4 * width + 3, width)}
    for block in range(blocks):
        for name, size in sizes.items():
            state[f"h.{block}.{name}.weight"] = (torch.randn(size, generator=generator) * 3).round()
            state[f"h.{block}.{name}.bias"] = torch.randn(size[1], generator=generator)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def look(path):
    with open_checkpoint(path) as checkpoint:
        return inspect(checkpoint, Silent())


def compare(tmp_path, state, nm, sparsity, more, form):
    """Memory, streamed dense and streamed as bits, with masks; and what inspect says of each."""
    save_file(state, tmp_path / IN)
    want = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(want, sparsity, nm=nm, **more)
    done = prune_checkpoint(
        tmp_path / IN, tmp_path / OUT, sparsity, nm=nm, **more, masks=tmp_path / MASKS, format=form
    )
    assert_same(dimap.load_file(tmp_path / OUT), want)
    masks = dimap.load_masks(tmp_path / MASKS)
    assert list(masks) == list(pruning.masks)
    assert all(torch.equal(masks[x], pruning.masks[x]) for x in masks)
    assert done.report().to_dict() == pruning.report().to_dict()
    assert done.nm == pruning.nm
    assert done.nonzero == pruning.nonzero
    assert done.readings == (0 if not nm.startswith("auto") else done.readings)
    return pruning


@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("nm", "sparsity", "more"), CASES)
def test_as_in_memory(tmp_path, nm, sparsity, more, dtype, form) -> None:
    compare(tmp_path, vit(dtype, step=0.01), nm, sparsity, more, form)


@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("nm", ["2:4", "2:3", "5:16"])
def test_rows_of_in_and_out(tmp_path, nm, dtype, form) -> None:
    pruning = compare(tmp_path, gpt2(dtype=dtype), nm, None, {}, form)
    # c_proj of the MLP has 195 inputs.
    assert len(pruning.masks) == (8 if nm == "2:3" else 6)


@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("layout", ["in, out", "out, in"])
def test_experts(tmp_path, layout, form) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(16, 32)}
    for x in "qkvo":
        state[f"model.layers.0.self_attn.{x}_proj.weight"] = torch.randn(32, 32)
    for name, size in (("gate_up_proj", (32, 96)), ("down_proj", (48, 32))):
        shape = size if layout == "in, out" else size[::-1]
        state[f"model.layers.0.mlp.experts.{name}"] = torch.randn(3, *shape, generator=generator)
    compare(tmp_path, state, "2:4", None, {}, form)
    assert look(tmp_path / OUT).nm == "2:4 in 8 of 8 layers"


def test_more_than_a_chunk_and_wider_groups_than_one(tmp_path) -> None:
    """Rows of 40,000: a group of four rows is larger than what is decided at a time."""
    state = {f"h.{i}.c_fc.weight": torch.randn(8, 40_000).bfloat16() for i in range(2)}
    state |= {f"h.{i}.c_fc.bias": torch.randn(40_000) for i in range(2)}
    state |= {"h.0.long.weight": torch.randn(300, 1016)}
    patterns = {"mlp": [r"h\.(?P<block>\d+)\.(?:c_fc|long)\.weight"]}
    for nm, form in (("2:4", "dense"), ("3:8", "bitmask"), ("2:4", "compact")):
        compare(tmp_path, state, nm, None, {"patterns": patterns}, form)
        (tmp_path / OUT).unlink()
        (tmp_path / MASKS).unlink()


def test_a_folder_and_what_torch_saved(tmp_path) -> None:
    state = vit(step=0.01)
    want = {name: tensor.clone() for name, tensor in state.items()}
    dimap.prune(want, nm="2:4")
    shards(tmp_path / "in", state)
    prune_checkpoint(tmp_path / "in", tmp_path / "out", nm="2:4")
    assert_same(load_folder(tmp_path / "out"), want)
    assert look(tmp_path / "out").nm == "2:4 in 8 of 8 layers"
    torch.save(state, tmp_path / "in.pth")
    prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", nm="2:4", masks=tmp_path / MASKS)
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), want)
    assert look(tmp_path / "out.pth").nm == "2:4 in 8 of 8 layers"
    prune_checkpoint(tmp_path / "in.pth", tmp_path / "auto.pth", 0.5, nm="auto")
    auto = dict(state)
    dimap.prune(auto, 0.5, nm="auto")
    assert_same(torch.load(tmp_path / "auto.pth", weights_only=True), auto)


@pytest.mark.parametrize("place", [0, 31, 4095])
def test_what_is_not_finite_leaves_no_output(tmp_path, place) -> None:
    state = vit()
    state["blocks.1.mlp.fc2.weight"].view(-1)[place] = float("inf")
    save_file(state, tmp_path / IN)
    with pytest.raises(
        ValueError,
        match=rf"blocks\.1\.mlp\.fc2\.weight must be finite, got inf at flat index {place}",
    ):
        prune_checkpoint(tmp_path / IN, tmp_path / OUT, nm="2:4", masks=tmp_path / MASKS)
    assert [path.name for path in tmp_path.iterdir()] == [IN]


def test_inputs_that_do_not_fit(tmp_path) -> None:
    save_file(vit(width=20), tmp_path / IN)
    done = prune_checkpoint(tmp_path / IN, tmp_path / OUT, nm="2:8")
    assert done.notes[0].startswith("left dense, since 8 does not divide their inputs: 6 layers")
    assert look(tmp_path / OUT).nm == "2:8 in 2 of 8 layers"
    with pytest.raises(ValueError, match="scope must be left out with nm 2:4"):
        prune_checkpoint(tmp_path / IN, tmp_path / OUT, nm="2:4", scope="layer", force=True)


@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_wanda(tmp_path, dtype, ending, form) -> None:
    """By magnitudes times the norms of inputs, whose groups are those of the magnitudes."""
    state = vit(dtype, step=0.01)
    prunable = [name for name in state if name.startswith("blocks.") and state[name].ndim == 2]
    norms = {name: torch.rand(1, state[name].shape[1]) + 0.1 for name in prunable}
    save_file(norms, tmp_path / "norms")
    source, out = tmp_path / f"in.{ending}", tmp_path / "out.safetensors"
    (save_file if ending == "safetensors" else torch.save)(state, source)
    options = {"nm": "2:4", "method": "wanda", "input_norms": tmp_path / "norms", "format": form}
    done = prune_checkpoint(source, out, **options, masks=tmp_path / MASKS)
    want = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(want, nm="2:4", saliency=dimap.saliency.by_norms(state, norms))
    for name in prunable:
        saliency = state[name].float().abs() * norms[name]
        assert torch.equal(pruning.masks[name], dimap.reference.select_nm([saliency], 2, 4)[0])
    assert_same(dimap.load_file(out), want)
    assert done.nm == pruning.nm
    assert done.saliency == "wanda"
    assert done.kept == pruning.kept
    assert done.nonzero == pruning.nonzero
    masks = dimap.load_masks(tmp_path / MASKS)
    assert all(torch.equal(masks[x], pruning.masks[x]) for x in masks)


# The command


def test_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = runner(capsys)
    state = vit()
    save_file(state, tmp_path / IN)
    code, out, _ = run("prune", tmp_path / IN, tmp_path / OUT, "--nm", "2:4", "--layers")
    assert code == 0
    assert "2:4 in 8 of 8 layers" in out
    assert "N:M" in out
    dimap.prune(state, nm="2:4")
    assert_same(load_file(tmp_path / OUT), state)
    code, out, _ = run("inspect", tmp_path / OUT, "--json")
    assert json.loads(out)["nm"] == "2:4 in 8 of 8 layers"
    code, out, _ = run("inspect", tmp_path / OUT, "--layers")
    assert "2:4 in 8 of 8 layers" in out
    code, out, _ = run("inspect", tmp_path / IN, "--layers")
    assert "N:M" not in out
    code, out, _ = run(
        "prune", tmp_path / IN, "--out-dir", tmp_path / "many", "--nm", "auto:8", "-s", "0.5"
    )
    assert code == 0
    code, out, err = run(
        "prune", tmp_path / IN, tmp_path / "x.safetensors", "--nm", "2:4", "-s", "0.5"
    )
    assert code != 0
    assert "sparsity must be left out with nm 2:4" in err
    for wrong in (["--nm", "auto"], []):
        code, _, err = run("prune", tmp_path / IN, tmp_path / "x.safetensors", *wrong)
        assert code != 0
        assert "--sparsity" in err
    assert not (tmp_path / "x.safetensors").exists()


# Counts of groups


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64]
)
@pytest.mark.parametrize(
    "shape", [(7, 48), (1, 720), (720, 33), (3, 48, 5), (2, 96, 1), (4, 0), (5, 32, 40_000)]
)
@pytest.mark.parametrize("axis", [-1, -2])
def test_counts_of_groups_in_files_are_those_in_memory(tmp_path, shape, axis, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
    w.flatten()[:3] = torch.tensor([-0.0, 0.0, -0.0])[: w.numel()]
    w = w.mul(100).to(dtype)
    save_file({"w": w}, tmp_path / IN)
    begin = (tmp_path / IN).stat().st_size - w.nbytes
    at = w.dim() + axis
    grid = [torch.Size(shape[:at]).numel(), shape[at], torch.Size(shape[at + 1 :]).numel()]
    mask = (1 << 8 * w.itemsize) - 1 >> (dtype != torch.int8)
    # The same as bits, three bits into a byte.
    ones = np.concatenate([[False, True, True], (w != 0).flatten().numpy()])
    (tmp_path / "bits").write_bytes(np.packbits(ones, bitorder="little").tobytes() + b"\0")
    with open(tmp_path / IN, "rb") as file, open(tmp_path / "bits", "rb") as bits:
        files = [(file.fileno(), IN), (bits.fileno(), "bits")]
        found = _C.count_groups(files, [(0, begin, w.itemsize, mask, *grid), (1, 3, 0, 0, *grid)])
    want = (int(w.count_nonzero()), most_in_groups(w, axis))
    if w.numel():
        assert found == [want, want]
    assert found[0][0] == found[1][0] == want[0]
