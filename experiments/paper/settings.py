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
METHODS = ("dimap", "lamp", "uniform", "global_magnitude", "taylor", "wanda", "snip")
WITHOUT_DATA = ("dimap", "lamp", "uniform", "global_magnitude")
FEATURE_METHODS = (*WITHOUT_DATA, "taylor", "wanda")
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
    tunes: ratios at which the methods are fine-tuned; None: all.
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
    tunes: tuple[float, ...] | None = None
    threads: int = 1
    bf16: bool = False


@dataclass(frozen=True)
class Features:
    """Sizes of a run that judges the features of the real ViT-S; one model, so there are no seeds.

    size: pixels of a crop. scopes: pairs of a method and where its one threshold holds.
    calibration: crops for the methods that need data.
    tune_ratios, tune_methods: what is judged after a recovery too, of `tune_steps` steps, by crops
        of `tune_size` pixels.
    """

    name: str
    size: int = 224
    ratios: tuple[float, ...] = RATIOS
    methods: tuple[str, ...] = FEATURE_METHODS
    # The ViT has one stage, so a threshold for each stage is one for the network.
    scopes: tuple[tuple[str, str], ...] = (
        ("dimap", "type"),
        ("dimap", "block"),
        ("global_magnitude", "module"),
    )
    calibration: int = 24
    tune_ratios: tuple[float, ...] = (0.50, 0.70)
    tune_methods: tuple[str, ...] = ("dimap", "uniform")
    tune_steps: int = 200
    tune_size: int = 112
    tune_batch: int = 4
    tune_lr: float = 2e-5


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
)
LARGE = Settings(
    "large",
    swin(32, [2, 2, 6, 2], [1, 2, 4, 8], 2),
    epochs=30,
    tune_steps=50,
    seeds=(0,),
    scopes=(),
    lr=1e-3,
    tune_lr=2e-4,
    scope_tunes=(),
    tunes=(0.50,),
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
)
FEATURES = Features("features")
ALL: dict[str, Settings | Features] = {s.name: s for s in (QUICK, LARGE, FULL, MICRO, FEATURES)}


def key(cell: Cell) -> str:
    """A name for the cell's results: the same settings, the same name."""
    text = json.dumps({"version": VERSION, **cell}, sort_keys=True)
    return f"{cell['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def train_cells(s: Settings) -> list[Cell]:
    shared = {"config": s.config, "epochs": s.epochs, "lr": s.lr, "batch": s.batch}
    shared |= {"weight_decay": s.weight_decay, "images": s.images, "test": s.test}
    shared |= _processor(s)
    return [{"kind": "train", "seed": seed, **shared} for seed in s.seeds]


def _processor(s: Settings) -> Cell:
    """Nothing for settings that are as they always were, so that what is cached keeps its name."""
    return {"threads": s.threads, "bf16": True} if s.bf16 else {}


def prune_cells(s: Settings, trained: Cell) -> Iterator[Cell]:
    """What is done with one trained model."""
    shared = {"kind": "prune", "trained": key(trained), "seed": trained["seed"]}
    shared |= {"config": s.config, "batch": s.batch, "test": s.test, "images": s.images}
    shared |= _processor(s) | ({"hundreds": True} if len(s.seeds) == 1 else {})
    tune = {"steps": s.tune_steps, "lr": s.tune_lr, "weight_decay": s.weight_decay}
    yield {**shared, "method": "dense", "ratio": 0.0, "tune": tune}
    for ratio in s.ratios:
        for method in s.methods:
            data = {} if method in WITHOUT_DATA else {"calibration": s.calibration}
            tuned = {"tune": tune if s.tunes is None or ratio in s.tunes else None}
            yield {**shared, "method": method, "ratio": ratio, **tuned, **data}
        for scope in s.scopes:
            tuned = {"tune": tune if ratio in s.scope_tunes else None}
            yield {**shared, "method": "dimap", "scope": scope, "ratio": ratio, **tuned}


def feature_cells(s: Features) -> list[Cell]:
    """What is done with the real ViT-S."""
    shared: Cell = {"kind": "features", "size": s.size}

    def cell(method: str, ratio: float, tune: Cell | None = None, **scope: str) -> Cell:
        data = {} if method in WITHOUT_DATA else {"calibration": s.calibration}
        return {**shared, "method": method, "ratio": ratio, "tune": tune, **scope, **data}

    tune = {"steps": s.tune_steps, "size": s.tune_size, "batch": s.tune_batch, "lr": s.tune_lr}
    return [
        cell("dense", 0.0),
        *(cell(method, ratio) for ratio in s.ratios for method in s.methods),
        *(cell(method, ratio, scope=scope) for ratio in s.ratios for method, scope in s.scopes),
        *(cell(method, ratio, tune) for ratio in s.tune_ratios for method in s.tune_methods),
    ]
