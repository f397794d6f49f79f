"""The model that is fine-tuned: built from its checkpoint, its input, and the masks it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _timm
from ..checkpoint import open_checkpoint
from ..flops import default_input_size, full_size
from ..groups import Choice, find_modules, prunable, wholes
from ..masks import fit_masks, load_masks
from .settings import Settings

# What a checkpoint says of its model and that stays true. All else is of its weights, or of the run
# that made them: accuracy, epochs, data.
LASTING = ("format", "architecture", "config", "mean", "std")


@dataclass
class Source:
    """A model to train, and the strings that are stored beside its weights."""

    model: nn.Module
    name: str
    metadata: dict[str, str] = field(default_factory=dict)


def open_model(
    checkpoint: nn.Module | str | os.PathLike[str], settings: Settings, classes: int | None = None
) -> Source:
    """The model in float32 on the CPU, with the weights of `checkpoint`.

    classes: give it a new classifier of this size.

    Raises OSError where the checkpoint cannot be read; ValueError where it does not say which model
    it is, or is not that model's.
    """
    if isinstance(checkpoint, nn.Module):
        source = Source(checkpoint, type(checkpoint).__name__)
        architecture, config = _pretrained(checkpoint).get("architecture"), dict[str, Any]()
    else:
        source, architecture, config = _read_model(os.fspath(checkpoint), settings)
    model = source.model
    if classes is not None:
        if not hasattr(model, "reset_classifier"):
            raise ValueError(f"{source.name} must have timm's reset_classifier for --reset-head")
        _timm.seeded(settings.seed, lambda: cast(Any, model).reset_classifier(classes))
    if architecture is not None:
        source.metadata["architecture"] = architecture
        # Where it is not the architecture's own number of classes.
        count, own = getattr(model, "num_classes", None), _pretrained(model).get("num_classes")
        if isinstance(count, int) and count != config.get("num_classes", own):
            config = {**config, "num_classes": count}
        if config:
            source.metadata["config"] = json.dumps(config)
    return source


def _read_model(path: str, settings: Settings) -> tuple[Source, str | None, dict[str, Any]]:
    """The model in a file, timm's name of it, and the arguments that it must be built with."""
    with open_checkpoint(path) as checkpoint:
        found = _timm.described(path, checkpoint.metadata)
        if settings.timm_model:
            found = settings.timm_model.removeprefix("timm:"), {}
        if found is None:
            raise ValueError(f"{path} does not say which timm model it is: give --model timm:NAME")
        architecture, config = found
        if settings.input_size is not None:
            config = {**config, "img_size": settings.input_size}
        drop = {} if settings.drop_path is None else {"drop_path_rate": settings.drop_path}
        state = {name: checkpoint.get(name) for name in checkpoint.tensors}
        model = _timm.with_all_weights(architecture, {**config, **drop}, state, path, settings.seed)
        kept = {key: text for key, text in checkpoint.metadata.items() if key in LASTING}
        return Source(model, path, kept), architecture, config


def _pretrained(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's pretrained weights: its architecture, classes, input."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def input_of(source: Source, settings: Settings) -> dict[str, Any]:
    """What the model takes in: by the settings, else by the checkpoint, else as timm has it.

    Returns input_size (channels, height, width), mean, std, crop_pct and interpolation.
    """
    from timm.data import resolve_data_config

    side: int | Sequence[int] = settings.input_size or 224
    if settings.input_size is None:
        with suppress(ValueError):  # it does not say its own
            side = default_input_size(source.model)
    size = full_size(source.model, side)
    if (channels := size[0]) not in (1, 3):
        raise ValueError(f"{source.name} must take images of 1 or 3 channels, got {channels}")
    given: dict[str, Any] = {
        "input_size": size,
        "mean": settings.mean or _numbers(source.metadata.get("mean")),
        "std": settings.std or _numbers(source.metadata.get("std")),
        "crop_pct": settings.crop_pct,
        "interpolation": settings.interpolation,
    }
    for name in ("mean", "std"):
        if given[name] and len(given[name]) not in (1, channels):
            raise ValueError(
                f"{name} must have one number for each of the {channels} channels, "
                f"got {len(given[name])}"
            )
    found = resolve_data_config(given, pretrained_cfg=_pretrained(source.model))
    for name in ("mean", "std"):
        if len(found[name]) != channels:  # of colours, for a gray image: their mean
            found[name] = (sum(found[name]) / len(found[name]),) * channels
    return {name: found[name] for name in given}


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        return None


def outputs_of(source: Source, size: tuple[int, ...]) -> int:
    """The classes that the model tells apart; one image of this size goes through it.

    Raises ValueError where it does not take the image, or gives something else.
    """
    model = source.model
    was_training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, *size, device=next(model.parameters()).device))
    except Exception as error:
        raise ValueError(f"{source.name} must take images {list(size)}, got: {error}") from error
    finally:
        model.train(was_training)
    if not isinstance(out, Tensor) or out.ndim != 2:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{source.name} must give one number for each class, got {got}")
    return out.shape[1]


def masks_of(
    source: Source,
    masks: Mapping[str, Tensor] | str | os.PathLike[str] | None,
    settings: Settings,
    choice: Choice = Choice(),  # noqa: B008 - frozen
) -> dict[str, Tensor]:
    """The masks that are held: those given, or the zeros of the prunable weights.

    None are where nothing is trained, so that no weight changes.

    choice: which weights may be pruned.

    Raises as `apply_masks`, and ValueError where none are given and there is no zero, or where those
    given revive zeros or prune more and the settings do not allow it.
    """
    if masks is None and not settings.epochs:
        return {}
    weights = dict(source.model.named_parameters(remove_duplicate=False))
    if isinstance(masks, (str, os.PathLike)):
        given = load_masks(masks)
        try:
            found = fit_masks(given, weights)
        except ValueError as error:
            raise ValueError(f"{Path(masks)} must hold masks of {source.name}: {error}") from error
    elif masks is not None:
        found = fit_masks(masks, weights)
    else:
        found = dict.fromkeys(_prunable(source.model, choice), torch.empty(0))
    if masks is None or settings.masks_from_zeros:
        found = {name: weights[name].detach() != 0 for name in found}
        if found and all(bool(mask.all()) for mask in found.values()):
            raise ValueError(
                f"{source.name} has no zeros to hold: prune it first, give --masks FILE, or train "
                "without masks by --dense"
            )
    elif found and not settings.allow_mask_change:
        _check_agreement(source, found, weights, choice)
    return found if settings.epochs else {}


def _prunable(model: nn.Module, choice: Choice) -> list[str]:
    """The names of the weights that may be pruned."""
    return wholes(p for layer in prunable(find_modules(model, choice)) for p in layer.parameters)


def _check_agreement(
    source: Source,
    masks: Mapping[str, Tensor],
    weights: Mapping[str, nn.Parameter],
    choice: Choice,
) -> None:
    """Refuse masks that keep or drop other weights than the checkpoint does."""
    held = {weights[name]: mask for name, mask in masks.items()}
    try:  # what has no mask is free, its zeros too
        names = _prunable(source.model, choice)
    except ValueError:  # a model that dimap does not know
        names = []
    revived = pruned = 0
    for weight in dict.fromkeys([*held, *(weights[name] for name in names)]):
        zero = weight.detach() == 0
        kept = held[weight].to(zero.device) if weight in held else torch.ones_like(zero)
        revived += int((kept & zero).sum())
        pruned += int((~kept & ~zero).sum())
    if revived or pruned:
        raise ValueError(
            f"masks must drop the zeros of {source.name} and nothing else, got masks that would "
            f"revive {revived:,} of its zeros and prune {pruned:,} more of its weights "
            "(--masks-from-zeros holds its own zeros, --allow-mask-change goes on with these masks)"
        )
