"""The settings of fine-tuning: the DIMAP paper's where it gives them, Swin's recipe where not.

Each field says what it is and what it may be; the options of `dimap finetune` are made from them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def _option(default: T, panel: str, text: str, **limits: Any) -> T:
    """A field with its help. limits: at_least, at_most, above, choices."""
    return field(default=default, metadata={"panel": panel, "help": text, **limits})


SCHEDULE, OPTIMIZER, IMAGES, LOSS, RUN = "Schedule", "Optimizer", "Images", "Loss", "Run"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting with its default; raises ValueError or TypeError for values out of range."""

    epochs: int = _option(
        30, SCHEDULE, "Passes over the training images; 0 only evaluates.", at_least=0
    )
    lr: float = _option(2e-5, SCHEDULE, "Highest learning rate.", above=0)
    min_lr: float = _option(2e-7, SCHEDULE, "Learning rate at the end.", at_least=0)
    warmup_epochs: int | None = _option(
        None, SCHEDULE, "Epochs in which the rate rises; half of all if not given.", at_least=0
    )
    warmup_lr: float = _option(2e-8, SCHEDULE, "Learning rate at the start.", at_least=0)
    sched: str = _option("cosine", SCHEDULE, "Schedule: cosine, tanh, step, multistep or poly.")

    batch_size: int = _option(128, OPTIMIZER, "Images of one process in one batch.", at_least=1)
    accumulate: int = _option(1, OPTIMIZER, "Batches for one step of the optimizer.", at_least=1)
    opt: str = _option("adamw", OPTIMIZER, "Optimizer, by timm's name.")
    weight_decay: float = _option(1e-8, OPTIMIZER, "Weight decay.", at_least=0)
    momentum: float = _option(
        0.9, OPTIMIZER, "Momentum, where the optimizer has it.", at_least=0, at_most=1
    )
    layer_decay: float | None = _option(
        None, OPTIMIZER, "Factor of the learning rate from layer to layer.", above=0, at_most=1
    )
    clip_grad: float | None = _option(
        5.0, OPTIMIZER, "Limit for gradients; 0 for none.", at_least=0
    )
    clip_mode: str = _option(
        "norm", OPTIMIZER, "What is limited.", choices=("norm", "value", "agc")
    )
    amp: str = _option(
        "bfloat16", OPTIMIZER, "Type of autocast.", choices=("bfloat16", "float16", "none")
    )
    ema: float | None = _option(
        None,
        OPTIMIZER,
        "Decay of an average of the weights, which is then kept.",
        above=0,
        at_most=1,
    )

    input_size: int | None = _option(
        None,
        IMAGES,
        "Side of the images; the model's own (224 in the paper) if not given.",
        at_least=1,
    )
    mean: tuple[float, ...] | None = _option(
        None, IMAGES, "Mean of the pixels; the model's if not given."
    )
    std: tuple[float, ...] | None = _option(
        None, IMAGES, "Their deviation; the model's if not given."
    )
    crop_pct: float | None = _option(
        None,
        IMAGES,
        "Seen share of a validation image; the model's if not given.",
        above=0,
        at_most=1,
    )
    interpolation: str | None = _option(None, IMAGES, "Of resizing; the model's if not given.")
    pad: int = _option(
        0, IMAGES, "Black pixels put around every image before all else.", at_least=0
    )
    augment: bool = _option(True, IMAGES, "Random crops, flips, colours, erasing; mixup apart.")
    scale_min: float = _option(
        0.08, IMAGES, "Smallest share of a training image.", above=0, at_most=1
    )
    hflip: float = _option(0.5, IMAGES, "Chance of a horizontal flip.", at_least=0, at_most=1)
    vflip: float = _option(0.0, IMAGES, "Chance of a vertical flip.", at_least=0, at_most=1)
    color_jitter: float = _option(0.4, IMAGES, "Strength, where AutoAugment is off.", at_least=0)
    auto_augment: str | None = _option(
        "rand-m9-mstd0.5-inc1",
        IMAGES,
        "AutoAugment or RandAugment policy, by timm's name; none for none.",
    )
    reprob: float = _option(0.25, IMAGES, "Chance of random erasing.", at_least=0, at_most=1)
    remode: str = _option(
        "pixel", IMAGES, "What erased parts become.", choices=("const", "rand", "pixel")
    )
    recount: int = _option(1, IMAGES, "Erased parts of an image.", at_least=1)
    mixup: float = _option(0.8, IMAGES, "alpha of mixup; 0 for none.", at_least=0)
    cutmix: float = _option(1.0, IMAGES, "alpha of CutMix; 0 for none.", at_least=0)
    mixup_prob: float = _option(1.0, IMAGES, "Chance of either.", at_least=0, at_most=1)
    mixup_switch_prob: float = _option(
        0.5, IMAGES, "Chance of CutMix where both are on.", at_least=0, at_most=1
    )
    mixup_mode: str = _option(
        "batch", IMAGES, "What is mixed alike.", choices=("batch", "pair", "elem")
    )
    mixup_off_epoch: int = _option(0, IMAGES, "Last epoch that has either; 0 for all.", at_least=0)

    smoothing: float = _option(0.1, LOSS, "Label smoothing.", at_least=0, at_most=1)
    bce: bool = _option(False, LOSS, "Binary cross-entropy in the place of cross-entropy.")
    distill_alpha: float = _option(
        0.5, LOSS, "Share of the teacher in the loss.", at_least=0, at_most=1
    )
    distill_temperature: float = _option(1.0, LOSS, "Temperature of both outputs.", above=0)

    drop_path: float | None = _option(
        None, RUN, "Stochastic depth; the model's own if not given.", at_least=0, at_most=1
    )
    seed: int = _option(42, RUN, "Of all that is random.", at_least=0)
    workers: int = _option(4, RUN, "Processes that load images; 0 for none.", at_least=0)
    compile: bool = _option(False, RUN, "Train through torch.compile.")

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name), each.type, each.metadata)
        if self.epochs and self.warmup >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than the {self.epochs} epochs, got {self.warmup}"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup, got {self.batch_size}")

    @property
    def warmup(self) -> int:
        """Epochs of warm-up: in the paper 15 of 30."""
        return self.epochs // 2 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def make_settings(options: dict[str, Any]) -> Settings:
    """Settings from options by name; TypeError for a name that is none."""
    names = [each.name for each in fields(Settings)]
    for name in options:
        if name not in names:
            raise TypeError(f"options must be among {', '.join(names)}, got {name}")
    return Settings(**options)


def _check(name: str, value: Any, kind: Any, limits: Any) -> None:
    if value is None and "None" in kind:
        return
    wanted = kind.removesuffix(" | None")
    if wanted in ("int", "float"):
        number = isinstance(value, int if wanted == "int" else (int, float))
        if not number or isinstance(value, bool):
            raise TypeError(
                f"{name} must be {'an' if wanted == 'int' else 'a'} {wanted}, got {value!r}"
            )
        # Written so that a NaN fails.
        if not (
            limits.get("at_least", -math.inf) <= value <= limits.get("at_most", math.inf)
            and value > limits.get("above", -math.inf)
            and math.isfinite(value)
        ):
            raise ValueError(f"{name} must be {_range(limits)}, got {value}")
    elif wanted == "bool" and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    elif wanted == "str" and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    elif wanted.startswith("tuple") and not (
        isinstance(value, (tuple, list))
        and value
        and all(isinstance(v, (int, float)) for v in value)
    ):
        raise TypeError(f"{name} must be numbers, one for each channel, got {value!r}")
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(limits['choices'])}, got {value}")


def _range(limits: Any) -> str:
    parts = [f"more than {limits['above']}"] if "above" in limits else []
    parts += [f"at least {limits['at_least']}"] if "at_least" in limits else []
    parts += [f"at most {limits['at_most']}"] if "at_most" in limits else []
    return " and ".join(parts) or "finite"
