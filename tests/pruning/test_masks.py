"""Masks in files and on models."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from dimap.masks import VERSION, apply_masks, load_masks, save_masks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {
    "one": (1,),
    "byte": (8,),
    "byte_and_one": (3, 3),
    "odd": (19, 111),
    "scalar": (),
    "none": (0, 5),
}


def random_masks(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(shape, generator=generator) < 0.4 for n, shape in shapes.items()}


def same(a, b):
    return list(a) == list(b) and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


def test_round_trip_of_odd_empty_and_scalar_shapes(tmp_path):
    masks = random_masks()
    save_masks(masks, tmp_path / "m.safetensors")
    assert same(load_masks(tmp_path / "m.safetensors"), masks)


@pytest.mark.parametrize("value", [False, True])
def test_round_trip_of_all_pruned_and_all_kept(tmp_path, value):
    masks = {"w": torch.full((5, 5), value)}
    save_masks(masks, tmp_path / "m.safetensors")
    assert same(load_masks(tmp_path / "m.safetensors"), masks)


def test_round_trip_of_no_masks(tmp_path):
    save_masks({}, tmp_path / "m.safetensors")
    assert load_masks(tmp_path / "m.safetensors") == {}


def test_non_contiguous_mask(tmp_path):
    mask = random_masks()["odd"].t()
    save_masks({"w": mask}, tmp_path / "m.safetensors")
    assert torch.equal(load_masks(tmp_path / "m.safetensors")["w"], mask)


def test_masks_of_shared_memory(tmp_path):
    mask = random_masks()["odd"]
    save_masks({"a": mask, "b": mask, "c": mask[3:]}, tmp_path / "m.safetensors")
    assert torch.equal(load_masks(tmp_path / "m.safetensors")["c"], mask[3:])


def test_format_is_as_documented(tmp_path):
    mask = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    save_masks({"w": mask}, tmp_path / "m.safetensors", {"note": "x"})
    assert load_file(tmp_path / "m.safetensors")["w"].tolist() == [0b00011001, 0b1]
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"dimap_masks": "1", "shapes": '{"w": [3, 3]}', "note": "x"}


def test_one_bit_a_weight(tmp_path):
    save_masks({"w": torch.ones(1000, 1000, dtype=torch.bool)}, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 1000 * 1000 / 8 + 1000


def test_save_replaces_and_leaves_nothing_else(tmp_path):
    save_masks(random_masks(), tmp_path / "m.safetensors")
    save_masks({"w": torch.ones(3, dtype=torch.bool)}, tmp_path / "m.safetensors")
    assert list(load_masks(tmp_path / "m.safetensors")) == ["w"]
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("masks", "metadata", "error", "match"),
    [
        ({"w": torch.ones(3)}, None, TypeError, "mask of w must be bool, got torch.float32"),
        ({"w": [True]}, None, TypeError, "mask of w must be a tensor, got list"),
        ({3: torch.ones(3) > 0}, None, TypeError, "under parameter names, got 3"),
        ([], None, TypeError, "masks must be a mapping"),
        ({}, {"shapes": "x"}, ValueError, "must not use the format's own key 'shapes'"),
        ({}, {"a": 1}, TypeError, "strings to strings, got 'a': 1"),
    ],
)
def test_save_refuses(tmp_path, masks, metadata, error, match):
    with pytest.raises(error, match=match):
        save_masks(masks, tmp_path / "m.safetensors", metadata)
    assert os.listdir(tmp_path) == []


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.m\.safetensors"):
        save_masks({}, tmp_path / "missing" / "m.safetensors")


def good(**changes):
    metadata = {"dimap_masks": VERSION, "shapes": json.dumps({"w": [3]})}
    return {k: v for k, v in (metadata | changes).items() if v is not None}


BYTE = {"w": torch.tensor([5], dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        (BYTE, good(dimap_masks=None), "must be a mask file of dimap"),
        (BYTE, good(dimap_masks="2"), "must have mask format version 1, got '2'"),
        (BYTE, good(shapes=None), "must hold the shapes of its masks as JSON"),
        (BYTE, good(shapes="{"), "must hold the shapes of its masks as JSON"),
        (BYTE, good(shapes='{"w": [-3]}'), "must hold the shapes of its masks as JSON"),
        (BYTE, good(shapes='{"w": [true]}'), "must hold the shapes of its masks as JSON"),
        (BYTE, good(shapes='{"w": [3], "v": [1]}'), "one shape for each mask, got a mismatch at v"),
        (BYTE, good(shapes="{}"), "one shape for each mask, got a mismatch at w"),
        (BYTE, good(shapes='{"w": [9]}'), r"must be uint8 \[2\] for shape \[9\]"),
        (BYTE, good(shapes='{"w": [2]}'), "must have zeros in its unused bits"),
        ({"w": torch.ones(1)}, good(), r"must be uint8 \[1\].*got torch.float32"),
    ],
)
def test_load_refuses(tmp_path, tensors, metadata, match):
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match=match):
        load_masks(tmp_path / "m.safetensors")


def test_load_good_of_the_refusals_above(tmp_path):
    save_file(BYTE, tmp_path / "m.safetensors", good())
    assert load_masks(tmp_path / "m.safetensors")["w"].tolist() == [True, False, True]


def test_load_truncated(tmp_path):
    save_masks(random_masks(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"m\.safetensors must be a complete safetensors file"):
        load_masks(tmp_path / "m.safetensors")


def test_load_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.safetensors"):
        load_masks(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_to_a_module(dtype):
    model = nn.Linear(19, 7).to(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = random_masks({"weight": (7, 19)})
    apply_masks(model, mask)
    assert torch.equal(model.weight.detach(), torch.where(mask["weight"], before["weight"], 0))
    assert torch.equal(model.bias.detach(), before["bias"])
    assert model.weight.requires_grad
    assert model.weight.grad_fn is None


def test_apply_to_a_state_dict_is_in_place():
    state = {"w": torch.arange(1.0, 5.0), "other": torch.ones(2)}
    tensor = state["w"]
    apply_masks(state, {"w": torch.tensor([True, False, False, True])})
    assert tensor.tolist() == [1, 0, 0, 4]
    assert state["w"] is tensor


def test_apply_drops_infinity_and_nan_too():
    state = {"w": torch.tensor([float("nan"), float("inf"), 1.0])}
    apply_masks(state, {"w": torch.tensor([False, False, True])})
    assert state["w"].tolist() == [0, 0, 1]


def test_apply_to_tied_parameters():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    apply_masks(model, {"b.weight": torch.zeros(3, 3, dtype=torch.bool)})
    assert not model["a"].weight.any()


@pytest.mark.parametrize(
    ("masks", "error", "match"),
    [
        (
            {"v": torch.zeros(2) > 1},
            ValueError,
            "must have every masked parameter, got none called v",
        ),
        ({"w": torch.zeros(3) > 1}, ValueError, r"mask of w must have .* shape \(2,\), got \(3,\)"),
        ({"w": torch.zeros(2, 1) > 1}, ValueError, "mask of w must have"),
        ({"w": torch.zeros(2)}, TypeError, "mask of w must be bool"),
        ({"text": torch.zeros(2) > 1}, TypeError, "text of the model must be a tensor, got str"),
        ({"meta": torch.zeros(2) > 1}, ValueError, "meta must hold weights"),
    ],
)
def test_apply_checks_all_before_it_changes_anything(masks, error, match):
    state = {
        "first": torch.ones(2),
        "w": torch.ones(2),
        "text": "x",
        "meta": torch.ones(2, device="meta"),
    }
    with pytest.raises(error, match=match):
        apply_masks(state, {"first": torch.zeros(2, dtype=torch.bool)} | masks)
    assert state["first"].all()


def test_apply_to_something_else():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a mapping .*, got list"):
        apply_masks([], {})


def test_the_old_order_of_arguments_is_taken_with_a_warning(tmp_path):
    masks = {"w": torch.ones(3, dtype=torch.bool)}
    with pytest.warns(FutureWarning, match="masks first, then path"):
        save_masks(tmp_path / "m.safetensors", masks)
    assert load_masks(tmp_path / "m.safetensors").keys() == {"w"}
