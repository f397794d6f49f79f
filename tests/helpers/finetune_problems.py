"""A micro Swin, a few images, and runs on them, for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dimap
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ARCHITECTURE = "timm.models.swin_transformer.SwinTransformer"
CONFIG = {
    "img_size": 16,
    "patch_size": 2,
    "in_chans": 3,
    "num_classes": 3,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}
# A fast run in which something is learned; the test says what else it wants.
QUICK: dict[str, Any] = {
    "epochs": 2, "lr": 2e-3, "batch_size": 8, "workers": 0, "progress": False, "device": "cpu",
}  # fmt: skip


def swin(**config: Any) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer(**{**CONFIG, **config})


def save_swin(path: Path, **config: Any) -> nn.Module:
    """Write a micro Swin with random weights."""
    model = swin(**config)
    metadata = {
        "format": "pt",
        "architecture": ARCHITECTURE,
        "config": json.dumps({**CONFIG, **config}),
        "trained_on": "noise",
    }
    save_file(model.state_dict(), path, metadata)
    return model


def save_images(root: Path, train: int = 20, validation: int = 7, side: int = 20) -> Path:
    """A folder of noisy red, green and blue squares: train/red/0.png, val/blue/3.png."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", validation)):
        for i in range(count):
            kind = i % 3
            pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
            pixels[..., kind] += 120
            folder = root / split / ("red", "green", "blue")[kind]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


class Interrupted(Exception):
    """What stops a run in the middle of an epoch."""


class Squares(torch.utils.data.Dataset):
    """The same in memory; asking for image 5 in epoch `fails_in` interrupts."""

    def __init__(self, count: int, fails_in: int | None = None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.transform: Any = None
        self.images = []
        for i in range(count):
            pixels = rng.integers(0, 120, (20, 20, 3), dtype=np.uint8)
            pixels[..., i % 3] += 120
            self.images.append(Image.fromarray(pixels))
        self.fails_in, self.epoch = fails_in, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i == 5 and self.epoch == self.fails_in:
            raise Interrupted
        return self.transform(self.images[i]), i % 3


def assert_zero(path: Path, masks: dict[str, Tensor]) -> None:
    """Dropped weights have no bit set; kept ones are there."""
    weights = load_file(path)
    for name, mask in masks.items():
        bits = weights[name].view(torch.int32)
        assert not bits[~mask].any(), name
        assert bits[mask].any(), name


def pruned(
    folder: Path, sparsity: float = 0.5, **config: Any
) -> tuple[Path, Path, dict[str, Tensor]]:
    """A pruned checkpoint, its file of masks, and the masks."""
    model = save_swin(folder / "dense.safetensors", **config)
    pruning = dimap.prune(model, sparsity)
    pruning.save_masks(folder / "masks.safetensors")
    dimap.prune_checkpoint(folder / "dense.safetensors", folder / "pruned.safetensors", sparsity)
    return folder / "pruned.safetensors", folder / "masks.safetensors", dict(pruning.masks)
