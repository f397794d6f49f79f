"""The settings of fine-tuning: the DIMAP paper's where it gives them, Swin's recipe where not.

Each field declares its type, its range and its help; the options of `dimap finetune` are made from
these declarations.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .._errors import near

# In the folder of a run: what --resume needs; a row for each epoch.
STATE, HISTORY = "state.pt", "history.json"

# timm's, by how they begin.
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")

Pixels = Annotated[tuple[float, ...], Field(strict=False, min_length=1)] | None  # a channel each
Resize = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


def _option(panel: str, default: Any, description: str, **limits: Any) -> Any:
    """A field. panel: the heading of its option in the help; limits: as pydantic has them."""
    return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)


_schedule, _optimizer, _images, _loss, _run, _masks, _data = (
    partial(_option, panel)
    for panel in ("Schedule", "Optimizer", "Images", "Loss", "Run", "Masks", "Data and model")
)


class Settings(BaseModel):
    """Every setting with its default.

    Raises TypeError for a name that is none or a value of another type, ValueError for a value out
    of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    epochs: int = _schedule(30, "Passes over the training images; 0 only evaluates.", ge=0)
    lr: float = _schedule(2e-5, "Highest learning rate.", gt=0)
    min_lr: float = _schedule(2e-7, "Learning rate at the end.", ge=0)
    warmup_epochs: int | None = _schedule(
        None, "Epochs in which the rate rises; half of all if not given.", ge=0
    )
    warmup_lr: float = _schedule(2e-8, "Learning rate at the start.", ge=0)
    # timm's schedules that are a function of the number of steps alone, so that runs can resume.
    sched: Literal["cosine", "tanh", "step", "multistep", "poly"] = _schedule("cosine", "Schedule.")

    batch_size: int = _optimizer(128, "Images of one process in one batch.", ge=1)
    accumulate: int = _optimizer(1, "Batches for one step of the optimizer.", ge=1)
    opt: str = _optimizer("adamw", "Optimizer, by timm's name.")
    weight_decay: float = _optimizer(1e-8, "Weight decay.", ge=0)
    momentum: float = _optimizer(0.9, "Momentum, where the optimizer has it.", ge=0, le=1)
    layer_decay: float | None = _optimizer(
        None, "Factor of the rate from layer to layer.", gt=0, le=1
    )
    clip_grad: float | None = _optimizer(5.0, "Limit of the gradients; 0 for none.", ge=0)
    clip_mode: Literal["norm", "value", "agc"] = _optimizer("norm", "What is limited.")
    amp: Literal["bfloat16", "float16", "none"] = _optimizer("bfloat16", "Type of autocast.")
    ema: float | None = _optimizer(
        None, "Keep and judge an average of the weights with this decay.", gt=0, le=1
    )

    input_size: int | None = _images(None, "Side of the images; the model's if not given.", ge=1)
    mean: Pixels = _images(None, "Mean of the pixels; the model's if not given.")
    std: Pixels = _images(None, "Standard deviation of the pixels; the model's if not given.")
    crop_pct: float | None = _images(
        None, "Share of a validation image that is seen; the model's if not given.", gt=0, le=1
    )
    interpolation: Resize | None = _images(
        None, "How images are resized; the model's if not given."
    )
    pad: int = _images(0, "Black pixels put around every image before all else.", ge=0)
    augment: bool = _images(
        True, "Random crops, flips, colours, erasing. Mixup has its own options."
    )
    scale_min: float = _images(
        0.08, "Smallest share of a training image that a crop shows.", gt=0, le=1
    )
    hflip: float = _images(0.5, "Chance of a horizontal flip.", ge=0, le=1)
    vflip: float = _images(0.0, "Chance of a vertical flip.", ge=0, le=1)
    color_jitter: float = _images(
        0.4, "Strength of changes of colour, where AutoAugment is off.", ge=0
    )
    auto_augment: str | None = _images(
        "rand-m9-mstd0.5-inc1", "AutoAugment or RandAugment policy, by timm's name; none for none."
    )
    reprob: float = _images(0.25, "Chance of random erasing.", ge=0, le=1)
    remode: Literal["const", "rand", "pixel"] = _images("pixel", "What erased parts become.")
    recount: int = _images(1, "How many parts of an image are erased.", ge=1)
    mixup: float = _images(0.8, "alpha of mixup; 0 for none.", ge=0)
    cutmix: float = _images(1.0, "alpha of CutMix; 0 for none.", ge=0)
    mixup_prob: float = _images(1.0, "Chance of mixup or CutMix for a batch.", ge=0, le=1)
    mixup_switch_prob: float = _images(0.5, "Chance of CutMix where both are on.", ge=0, le=1)
    mixup_mode: Literal["batch", "pair", "elem"] = _images(
        "batch", "What is mixed in one way: a batch, pairs or single images."
    )
    mixup_off_epoch: int = _images(0, "Last epoch with mixup or CutMix; 0 for all.", ge=0)

    smoothing: float = _loss(0.1, "Label smoothing.", ge=0, le=1)
    bce: bool = _loss(False, "Binary cross-entropy in the place of cross-entropy.")
    distill_alpha: float = _loss(0.5, "Share of the teacher in the loss.", ge=0, le=1)
    distill_temperature: float = _loss(
        1.0, "Temperature of the outputs of model and teacher.", gt=0
    )

    drop_path: float | None = _run(None, "Stochastic depth; the model's if not given.", ge=0, le=1)
    seed: int = _run(42, "Seed of all that is random.", ge=0)
    workers: int = _run(4, "Processes that load images; 0 for none.", ge=0)
    compile: bool = _run(False, "Train through torch.compile.")

    masks_from_zeros: bool = _masks(
        False, "Hold the checkpoint's own zeros, whatever the masks say."
    )
    allow_mask_change: bool = _masks(
        False, "Train masks that revive zeros of the checkpoint, or prune more of it."
    )

    timm_model: str | None = _data(
        None, "timm's name of the model, where the checkpoint does not say it."
    )
    train_split: str = _data("train", "The split for training.")
    val_split: str = _data("validation", "The split for validation.")
    class_map: str | None = _data(None, "A file of class names to numbers, as timm has it.")
    reset_head: bool = _data(False, "Begin with a new classifier, for the classes of the data.")

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise _in_words(error) from None

    @field_validator("auto_augment")
    @classmethod
    def _check_policy(cls, policy: str | None) -> str | None:
        if policy is None or policy == "none":
            return None
        if (kind := policy.split("-")[0]) not in POLICIES:
            raise ValueError(
                f"auto_augment must be none or begin with one of {', '.join(POLICIES)}, "
                f"got {policy!r}{near(kind, (*POLICIES, 'none'))}"
            )
        return policy

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.epochs and self.warmup >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than the {self.epochs} epochs, got {self.warmup}"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup, got {self.batch_size}")
        return self

    @property
    def warmup(self) -> int:
        """Epochs of warm-up: in the paper 15 of 30."""
        return self.epochs // 2 if self.warmup_epochs is None else self.warmup_epochs

    def named(self, *names: str) -> dict[str, Any]:
        """Some of them by name: arguments of timm, which gave these their names."""
        return {name: getattr(self, name) for name in names}

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


def _in_words(invalid: ValidationError) -> Exception:
    """pydantic's first error in a sentence: what is required, then what was got."""
    first = invalid.errors()[0]
    if first["type"] == "value_error":  # of a validator above
        return ValueError(str(first["ctx"]["error"]))
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = list(Settings.model_fields)
        return TypeError(f"options must be among {', '.join(known)}, got {name}{near(name, known)}")
    wanted = re.sub(r"^\w+ should ", "must ", first["msg"])
    kind = TypeError if first["type"].endswith("_type") else ValueError
    return kind(f"{name} {wanted}, got {first['input']!r}")
