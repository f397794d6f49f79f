"""Other copies of the weights: no output serves dense ones without a word."""

from __future__ import annotations

import os
import re

import dimap
import pytest
import torch
from checkpoints import assert_same, shards, vit
from dimap.checkpoint import open_checkpoint
from dimap.stream import prune_checkpoint
from safetensors.torch import load_file, save_file

KEYS = [n for n, t in vit().items() if n.startswith("blocks") and t.ndim > 1]


def masked(seed, masks):
    state = vit(seed=seed)
    dimap.apply_masks(state, masks)
    return state


def prune(tmp_path, root, **options):
    """What torch.load gives of the pruned file, and the masks."""
    torch.save(root, tmp_path / "in.pth")
    prune_checkpoint(
        tmp_path / "in.pth", tmp_path / "out.pth", 0.5, masks=tmp_path / "m", force=True, **options
    )
    return torch.load(tmp_path / "out.pth", weights_only=True), dimap.load_masks(tmp_path / "m")


@pytest.mark.parametrize(
    ("first", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("model", "ema"),
        ("params", "params_ema"),
    ],
)
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_averages_have_the_same_masks(tmp_path, first, average, wrapped):
    ema = {wrapped + name: tensor for name, tensor in vit(seed=1).items()}
    got, masks = prune(tmp_path, {"epoch": 3, first: vit(), average: ema})
    assert_same(masks, dimap.select(vit(), 0.5))
    assert_same(got[first], masked(0, masks))
    assert_same({n.removeprefix(wrapped): t for n, t in got[average].items()}, masked(1, masks))
    with open_checkpoint(tmp_path / "in.pth") as checkpoint:
        assert checkpoint.notes == [
            f"{average!r}, a copy of these weights, is given the same masks"
        ]


def test_a_nested_average(tmp_path):
    root = {"state_dict": vit(), "callbacks": {"EMA": {"decay": 0.9, "ema_weights": vit(seed=1)}}}
    got, masks = prune(tmp_path, root)
    assert_same(got["callbacks"]["EMA"]["ema_weights"], masked(1, masks))


def test_two_candidates_are_listed_and_one_is_chosen(tmp_path):
    root = {
        "teacher": vit(seed=1),
        "student": {f"module.{n}": t for n, t in vit().items()},
        "epoch": 1,
    }
    with pytest.raises(
        ValueError, match="one set of weights, got 'teacher', 'student': --key NAME"
    ):
        prune(tmp_path, root)
    got, masks = prune(tmp_path, root, key="teacher")
    assert got.keys() == {"teacher", "epoch"}  # the dense student is left out
    assert_same(got["teacher"], masked(1, masks))
    got, masks = prune(tmp_path, root, all_copies=True, key="teacher")
    assert_same(masks, dimap.select(vit(seed=1), 0.5))
    assert_same(got["teacher"], masked(1, masks))
    student = {n.removeprefix("module."): t for n, t in got["student"].items()}
    assert_same(student, masked(0, masks))
    assert prune(tmp_path, root, all_copies=True)[0].keys() == root.keys()


def test_a_copy_with_another_prefix_and_another_head(tmp_path):
    student = {f"backbone.{n}": t for n, t in vit(seed=1).items() if not n.startswith("head")}
    student["head.mlp.weight"] = torch.ones(3, 3)
    got, masks = prune(tmp_path, {"model": vit(), "ema": student})
    want = masked(1, masks)
    assert all(torch.equal(got["ema"][f"backbone.{name}"], want[name]) for name in KEYS)
    assert got["ema"]["head.mlp.weight"].all()


def test_other_weights_are_kept_with_a_note(tmp_path):
    root = {
        "model": vit(),
        "discriminator": {"conv.weight": torch.ones(4, 4)},
        "ema": [torch.ones(5, 5)],
    }
    got, _ = prune(tmp_path, root)
    assert got["discriminator"]["conv.weight"].all()
    with open_checkpoint(tmp_path / "in.pth") as checkpoint:
        assert checkpoint.notes == [
            "'discriminator' is kept as it is: its weights are not pruned",
            "'ema[]' is kept as it is: its weights are not pruned",
        ]


def test_half_a_copy_is_refused(tmp_path):
    half = {name: tensor for name, tensor in vit(seed=1).items() if "mlp.fc1" not in name}
    with pytest.raises(ValueError, match=r"in\.pth: 'ema' must be a whole copy .* by --key: .*fc1"):
        prune(tmp_path, {"model": vit(), "ema": half})
    assert os.listdir(tmp_path) == ["in.pth"]


def test_copies_in_a_list(tmp_path):
    root = {"model": vit(), "snapshots": [{"weights": vit(seed=1)}, vit(seed=2)]}
    with pytest.raises(ValueError, match=r"got 'model', 'snapshots\.0\.weights', 'snapshots\.1'"):
        prune(tmp_path, root)
    got, masks = prune(tmp_path, root, all_copies=True)
    assert_same(got["snapshots"][0]["weights"], masked(1, masks))
    assert_same(got["snapshots"][1], masked(2, masks))
    with pytest.raises(ValueError, match="must hold one set of weights"):
        prune(tmp_path, root, key="model")  # nothing can be left out of a list


def test_what_optimizers_keep_is_no_copy(tmp_path):
    moments = {name: {"exp_avg": torch.ones_like(t)} for name, t in vit().items()}
    root = {"model": vit(), "optimizer": {"state": moments, "by_name": vit()}, "opt": vit()}
    got, _ = prune(tmp_path, root)
    assert_same(got["optimizer"]["by_name"], vit())


@pytest.mark.parametrize(("key", "place"), [("net", "net"), ("a.net", "a.net"), ("net.b", "net.b")])
def test_a_key_finds_its_place(tmp_path, key, place):
    root = inner = {}
    for part in place.split(".")[:-1]:
        inner[part] = inner = {}
    inner[place.rpartition(".")[2]] = vit()
    root["elsewhere"] = {"x": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"got 'net|got 'a|got 'elsewhere|must hold one set"):
        prune(tmp_path, {"p": vit(), "q": vit(), **root})
    got, masks = prune(tmp_path, root, key=key)
    for part in place.split("."):
        got = got[part]
    assert_same(got, masked(0, masks))


def test_a_key_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="must hold weights under 'ema', got 'model'"):
        prune(tmp_path, {"model": vit()}, key="ema")
    save_file(vit(), tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"key \(--key\) must be left out for safetensors"):
        open_checkpoint(tmp_path / "in.safetensors", key="model")


@pytest.fixture(params=["file", "shards", "bin"])
def folder(request, tmp_path):
    """A folder with earlier checkpoints below it, and one of another model."""
    path = tmp_path / "in"
    if request.param == "shards":
        shards(path, vit())
    else:
        path.mkdir()
        name = "model.safetensors" if request.param == "file" else "pytorch_model.bin"
        (save_file if request.param == "file" else torch.save)(vit(), path / name)
    (path / "checkpoint-500").mkdir()
    save_file(vit(seed=1), path / "checkpoint-500" / "model.safetensors", {"step": "500"})
    torch.save({"optimizer": vit()}, path / "checkpoint-500" / "optimizer.pt")
    shards(path / "checkpoint-900", vit(seed=2))
    torch.save({"state_dict": vit(seed=3), "ema": vit(seed=4)}, path / "last.ckpt")
    os.chmod(path / "last.ckpt", 0o444)
    save_file({"other.weight": torch.ones(2, 2)}, path / "other.safetensors")
    return path


def test_earlier_checkpoints_in_a_folder(folder, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        told = [note.partition(" is kept as it is")[0] for note in checkpoint.notes]
    parts = [f"checkpoint-900/model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    one = "checkpoint-500/model.safetensors"
    assert sorted(told) == sorted([one, *parts, "last.ckpt", "other.safetensors"])
    out = tmp_path / "out"
    done = prune_checkpoint(folder, out, 0.5, all_copies=True)
    masks = dimap.select(vit(), 0.5)
    assert_same(load_file(out / one), masked(1, masks))
    sharded = {n: t for part in parts for n, t in load_file(out / part).items()}
    assert_same(sharded, masked(2, masks))
    last = torch.load(out / "last.ckpt", weights_only=True)
    assert_same(last["state_dict"], masked(3, masks))
    assert_same(last["ema"], masked(4, masks))
    assert load_file(out / "other.safetensors")["other.weight"].all()
    notes = " ".join(done.summary().notes)
    assert "last.ckpt, a copy of these weights, is given the same masks" in notes
    assert "other.safetensors is kept as it is" in notes
    assert (out / "checkpoint-500" / "optimizer.pt").read_bytes() == (
        folder / "checkpoint-500" / "optimizer.pt"
    ).read_bytes()


def test_averages_in_a_list_have_the_same_masks(tmp_path):
    """As torch_ema keeps them: the parameters in their order, without buffers."""
    weights = vit() | {"blocks.0.attn.relative_position_index": torch.ones(4, 4, dtype=torch.int64)}
    shadow = list(vit(seed=1).values())
    root = {
        "model": weights,
        "ema": {"decay": 0.9, "shadow_params": shadow, "collected_params": None},
    }
    got, masks = prune(tmp_path, root)
    want = masked(1, masks)
    assert_same(dict(zip(want, got["ema"]["shadow_params"], strict=True)), want)
    with open_checkpoint(tmp_path / "in.pth") as checkpoint:
        told = "'ema.shadow_params[]', a copy of these weights, is given the same masks"
        assert checkpoint.notes == [told]
    assert prune(tmp_path, root, key="model")[0]["ema"].keys() == {"decay", "collected_params"}


def test_an_average_in_a_list_of_another_order_is_refused(tmp_path):
    shadow = list(reversed(vit(seed=1).values()))
    with pytest.raises(ValueError, match=r"'shadow_params\[\]' must hold the 12 matrices .* --key"):
        prune(tmp_path, {"model": vit(), "shadow_params": shadow})
    assert os.listdir(tmp_path) == ["in.pth"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("copy", ["checkpoint-500/model.safetensors", "last.ckpt"])
def test_a_damaged_copy_is_named(folder, tmp_path, copy, damage):
    if damage == "flipped" and copy != "last.ckpt":
        pytest.skip("safetensors have no sums")
    os.chmod(folder / copy, 0o644)
    data = bytearray((folder / copy).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / copy).write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder / copy))} must be a complete"):
        prune_checkpoint(folder, tmp_path / "out", 0.5, all_copies=True)
    assert sorted(os.listdir(tmp_path)) == ["in"]
    prune_checkpoint(folder, tmp_path / "out", 0.5)  # which leaves them as they are


def test_half_a_copy_in_a_folder_is_refused(folder, tmp_path):
    half = {name: tensor for name, tensor in vit(seed=1).items() if "mlp.fc1" not in name}
    save_file(half, folder / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors must be a whole copy .*fc1"):
        prune_checkpoint(folder, tmp_path / "out", 0.5, all_copies=True)


def test_a_record_that_is_not_what_was_written_is_refused(tmp_path):
    torch.save(vit(), tmp_path / "in.pth")
    data = bytearray((tmp_path / "in.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "in.pth").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"in\.pth must be a complete .* whose record \S+ is damaged"
    ):
        open_checkpoint(tmp_path / "in.pth")


def test_files_without_sums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(vit(), tmp_path / "in.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(tmp_path / "in.pth") as checkpoint:
        assert_same({name: checkpoint.get(name) for name in checkpoint.tensors}, vit())
