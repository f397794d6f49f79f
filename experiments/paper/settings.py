"""What the protocol runs: sizes of one run, and its cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Cell = dict[str, Any]

# Raise it when the code gives another result for the same cell: what is cached is then not used.
VERSION = 1
RATIOS = (0.19, 0.28, 0.38, 0.50, 0.65, 0.80, 0.90)  # the paper's Table 3, and three beyond
METHODS = ("dimap", "lamp", "uniform", "global_magnitude", "taylor", "snip")
WITHOUT_DATA = ("dimap", "lamp", "uniform", "global_magnitude")
# Module definitions, by Eq. 10: "module" is DIMAP, "global" LAMP; these come beside them.
SCOPES = ("type", "stage", "block")


@dataclass(frozen=True)
class Settings:
    """Sizes of one run.

    config: keyword arguments of timm's SwinTransformer.
    epochs, lr: of dense training; AdamW, cosine, batch `batch`.
    tune_steps, tune_lr: of fine-tuning with the masks held, the same batches for every method.
    calibration: training batches for the methods that need data.
    images: training images (the first); 0: all. test: test images (the first).
    threads, bf16: of a process on CPUs; bfloat16 is by autocast, on a GPU it always is.
    scope_tunes: ratios at which the module definitions are fine-tuned too.
    vit_size: pixels; 0: no features. vit_train: a class, vit_test: in all.
    """

    name: str
    config: dict[str, Any]
    epochs: float
    tune_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    ratios: tuple[float, ...] = RATIOS
    methods: tuple[str, ...] = METHODS
    scopes: tuple[str, ...] = SCOPES
    scope_tunes: tuple[float, ...] = (0.50, 0.80)
    batch: int = 128
    lr: float = 2e-3
    tune_lr: float = 5e-4
    weight_decay: float = 0.05
    calibration: int = 4
    images: int = 0
    test: int = 5000
    vit_size: int = 56
    vit_train: int = 80
    vit_test: int = 800
    threads: int = 1
    bf16: bool = False


def swin(width: int, depths: list[int], heads: list[int], patch: int) -> dict[str, Any]:
    return {
        "img_size": 32,
        "patch_size": patch,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": 4,
        "mlp_ratio": 4.0,
    }


QUICK = Settings("quick", swin(24, [2, 2, 2], [1, 2, 4], 4), epochs=5, tune_steps=50)
FULL = Settings(
    "full",
    swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 2),
    epochs=60,
    tune_steps=4690,
    lr=1e-3,
    tune_lr=2e-4,
    scope_tunes=RATIOS,
    calibration=16,
    test=10000,
    vit_size=224,
    vit_train=500,
    vit_test=5000,
)
LARGE = Settings(
    "large",
    swin(32, [2, 2, 6, 2], [1, 2, 4, 8], 2),
    epochs=30,
    tune_steps=100,
    seeds=(0,),
    lr=1e-3,
    tune_lr=2e-4,
    test=10000,
    vit_size=0,
    threads=2,
    bf16=True,
)
MICRO = Settings(
    "micro",
    swin(8, [1, 1], [1, 2], 8),
    epochs=1,
    tune_steps=2,
    seeds=(0, 1),
    ratios=(0.5, 0.9),
    scope_tunes=(0.5,),
    batch=16,
    calibration=1,
    test=40,
    vit_size=0,
)
ALL = {settings.name: settings for settings in (QUICK, LARGE, FULL, MICRO)}


def key(cell: Cell) -> str:
    """A name for the cell's results: the same settings, the same name."""
    text = json.dumps({"version": VERSION, **cell}, sort_keys=True)
    return f"{cell['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def train_cells(s: Settings) -> list[Cell]:
    shared = {"config": s.config, "epochs": s.epochs, "lr": s.lr, "batch": s.batch}
    shared |= {"weight_decay": s.weight_decay, "images": s.images, "test": s.test}
    shared |= {"threads": s.threads, "bf16": True} if s.bf16 else {}
    return [{"kind": "train", "seed": seed, **shared} for seed in s.seeds]


def prune_cells(s: Settings, trained: Cell) -> Iterator[Cell]:
    """What is done with one trained model."""
    shared = {"kind": "prune", "trained": key(trained), "seed": trained["seed"]}
    shared |= {"config": s.config, "batch": s.batch, "test": s.test, "images": s.images}
    tune = {"steps": s.tune_steps, "lr": s.tune_lr, "weight_decay": s.weight_decay}
    yield {**shared, "method": "dense", "ratio": 0.0, "tune": tune}
    for ratio in s.ratios:
        for method in s.methods:
            data = {} if method in WITHOUT_DATA else {"calibration": s.calibration}
            yield {**shared, "method": method, "ratio": ratio, "tune": tune, **data}
        for scope in s.scopes:
            tuned = {"tune": tune if ratio in s.scope_tunes else None}
            yield {**shared, "method": "dimap", "scope": scope, "ratio": ratio, **tuned}


def feature_cells(s: Settings) -> list[Cell]:
    """What is done with the real ViT-S; its weights are one model, so there are no seeds."""
    if not s.vit_size:
        return []
    shared = {"kind": "features", "size": s.vit_size, "train": s.vit_train, "test": s.vit_test}
    pruned = [
        {**shared, "method": method, "ratio": ratio}
        for ratio in s.ratios
        for method in WITHOUT_DATA
    ]
    return [{**shared, "method": "dense", "ratio": 0.0}, *pruned]
