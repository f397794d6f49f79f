"""The demo's Swin: timm's own class at a size that a laptop can train.

Four stages of two blocks each, as in Swin-T, so every parameter carries its timm name
("layers.0.blocks.0.attn.qkv.weight") and all of DIMAP's three modules and their shifted windows,
relative-position tables and patch merging are there. 1.29 M parameters, 5.1 MB in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "swin_fashion.safetensors"
SAMPLE = HERE / "sample.safetensors"

# Keyword arguments of timm.models.swin_transformer.SwinTransformer.
CONFIG: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 24,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
    "mlp_ratio": 4.0,
}
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels scaled to [0, 1]


def build_model(config: dict[str, Any] | None = None, drop_path: float = 0.0) -> nn.Module:
    """A Swin with fresh weights; `config` is CONFIG unless given (a checkpoint's, say)."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(**(CONFIG if config is None else config), drop_path_rate=drop_path)


def to_input(images: Tensor) -> Tensor:
    """uint8 [n, 28, 28] -> float32 [n, 1, 32, 32]: a black border of 2, scaled, normalised."""
    x = F.pad(images.float() / 255, (2, 2, 2, 2))
    return ((x - MEAN) / STD).unsqueeze(1)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """The class, int64 [n], that the model gives each of uint8 images [n, 28, 28]."""
    model.eval()
    return torch.cat([model(to_input(x)).argmax(1) for x in images.split(batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified correctly, in percent."""
    return 100 * (predict(model, images) == labels).double().mean().item()


def read_metadata(path: str | Path = CHECKPOINT) -> dict[str, str]:
    """The strings that train.py stored beside the weights."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def load_model(path: str | Path = CHECKPOINT) -> nn.Module:
    """The model of a checkpoint that train.py wrote, pruned or not; names must match exactly."""
    config = read_metadata(path).get("config")
    model = build_model(json.loads(config) if config else None)
    model.load_state_dict(load_file(str(path)), strict=True)
    return model.eval()


def load_sample(path: str | Path = SAMPLE) -> tuple[Tensor, Tensor]:
    """The held-out sample: uint8 images [1000, 28, 28] and int64 labels [1000]."""
    tensors = load_file(str(path))
    return tensors["images"], tensors["labels"].long()
