"""The shipped demo model and sample: intact, small, and as accurate as their metadata says."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("safetensors")

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def load(name: str):
    """A script of the demo folder as a module, without leaving the folder on sys.path."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load("model")


@pytest.fixture(scope="module")
def train():
    sys.modules["model"] = demo  # train.py is run from its folder, where it imports `model`
    try:
        yield load("train")
    finally:
        del sys.modules["model"]


def test_files_are_small_enough_to_ship():
    assert demo.CHECKPOINT.stat().st_size < 6_000_000
    assert demo.SAMPLE.stat().st_size < 1_000_000


def test_checkpoint_loads_strictly_into_the_timm_model():
    model = demo.load_model()
    assert model.layers[1].blocks[1].attn.qkv.weight.shape == (144, 48)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_checkpoint_is_dense():
    weights = [p for p in demo.load_model().parameters() if p.ndim == 2]
    assert all((w != 0).all() for w in weights)


def test_sample_has_one_hundred_images_of_each_class():
    images, labels = demo.load_sample()
    assert images.shape == (1000, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [100] * 10


def test_sample_images_are_all_different():
    images, _ = demo.load_sample()
    assert len(images.flatten(1).unique(dim=0)) == 1000


def test_sample_accuracy_is_within_three_points_of_the_stated_test_accuracy():
    stated = float(demo.read_metadata()["test_accuracy"])
    assert stated >= 85  # a trained model, not merely a model
    assert abs(demo.accuracy(demo.load_model(), *demo.load_sample()) - stated) <= 3


def test_sample_accuracy_is_the_stated_one():
    # One image of 1,000 may tip over where a machine rounds otherwise; five do not.
    stated = float(demo.read_metadata()["sample_accuracy"])
    assert abs(demo.accuracy(demo.load_model(), *demo.load_sample()) - stated) <= 0.5


@pytest.mark.parametrize("packed", [False, True])
def test_read_idx_gives_the_shape_in_the_header(train, tmp_path, packed):
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert train.read_idx(tmp_path, "x").tolist() == [[[1, 2, 3]], [[4, 5, 255]]]


def test_read_idx_names_the_missing_file(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\.gz"):
        train.read_idx(tmp_path, "t10k-images-idx3-ubyte")


def test_read_idx_refuses_another_format(train, tmp_path):
    (tmp_path / "x").write_bytes(b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00")
    with pytest.raises(ValueError, match="idx file of unsigned bytes"):
        train.read_idx(tmp_path, "x")


def test_augment_only_flips_and_shifts(train):
    image = torch.zeros(64, 28, 28, dtype=torch.uint8)
    image[:, 14, 13] = 200
    moved = train.augment(image, torch.Generator().manual_seed(0))
    assert (moved == 200).sum(dim=(1, 2)).tolist() == [1] * 64
    _, rows, cols = (moved == 200).nonzero().T.tolist()
    assert set(rows) == {12, 13, 14, 15, 16}
    assert set(cols) == {11, 12, 13, 14, 15, 16}  # 13 and its mirror image 14, each ± 2


def test_stratified_takes_the_same_number_of_each_class(train):
    labels = torch.arange(10).repeat(7)
    picked = train.stratified(labels, 3, seed=0)
    assert labels[picked].bincount().tolist() == [3] * 10
    assert len(picked.unique()) == 30
