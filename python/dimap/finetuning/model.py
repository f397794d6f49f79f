"""The model that is fine-tuned: built from its checkpoint, with what is known of its input."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _timm
from ..checkpoint import open_checkpoint
from ..groups import AUX, find_modules
from ..masks import fit_masks, load_masks
from .data import Input
from .settings import Settings


@dataclass
class Source:
    """A model to train, and the strings that are stored beside its weights."""

    model: nn.Module
    name: str
    metadata: dict[str, str] = field(default_factory=dict)


def open_model(
    checkpoint: nn.Module | str | os.PathLike[str],
    settings: Settings,
    *,
    timm_model: str | None,
    classes: int | None = None,
) -> Source:
    """The model in float32 on the CPU, with the weights of `checkpoint`.

    timm_model: timm's name for it, where the checkpoint does not say it.
    classes: give it a new classifier of this size.

    Raises OSError where the checkpoint cannot be read; ValueError where it does not say which model
    it is, or is not that model's.
    """
    architecture: str | None
    config: dict[str, Any]
    if isinstance(checkpoint, nn.Module):
        source = Source(checkpoint, type(checkpoint).__name__)
        architecture, config = _pretrained(checkpoint).get("architecture"), {}
    else:
        source, architecture, config = _read_model(os.fspath(checkpoint), settings, timm_model)
    model = source.model
    if classes is not None:
        if not hasattr(model, "reset_classifier"):
            raise ValueError(f"{source.name} must have timm's reset_classifier for --reset-head")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            cast(Any, model).reset_classifier(classes)
    if architecture is not None:
        source.metadata["architecture"] = architecture
        # Where it is not the architecture's own number of classes.
        count, own = getattr(model, "num_classes", None), _pretrained(model).get("num_classes")
        if isinstance(count, int) and count != config.get("num_classes", own):
            config = {**config, "num_classes": count}
        if config:
            source.metadata["config"] = json.dumps(config)
    return source


def _read_model(
    path: str, settings: Settings, timm_model: str | None
) -> tuple[Source, str, dict[str, Any]]:
    """The model in a file, timm's name of it, and the arguments that it must be built with."""
    with open_checkpoint(path) as checkpoint:
        found = (timm_model, {}) if timm_model else _timm.described(path, checkpoint.metadata)
        if found is None:
            raise ValueError(
                f"{path} must say which timm model it is, or --timm-model NAME must, got neither"
            )
        architecture, config = found
        if settings.input_size is not None:
            config = {**config, "img_size": settings.input_size}
        drop = {} if settings.drop_path is None else {"drop_path_rate": settings.drop_path}
        state = {name: checkpoint.get(name) for name in checkpoint.tensors}
        model = _timm.with_all_weights(architecture, {**config, **drop}, state, path, settings.seed)
        return Source(model, path, dict(checkpoint.metadata)), architecture, config


def _pretrained(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's pretrained weights: its architecture, classes, input."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def input_of(source: Source, settings: Settings) -> Input:
    """What the model takes in: by the settings, else by the checkpoint, else as timm has it."""
    from timm.data import resolve_data_config

    model = source.model
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    if channels not in (1, 3):
        raise ValueError(f"{source.name} must take images of 1 or 3 channels, got {channels}")
    pretrained = _pretrained(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    side = settings.input_size
    if side is not None:
        sides = (side, side)
    elif isinstance(built_for, tuple):
        sides = built_for
    else:
        sides = tuple(pretrained.get("input_size", (3, 224, 224))[1:])
    given: dict[str, Any] = {
        "input_size": (channels, *sides),
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
    found = resolve_data_config(given, pretrained_cfg=pretrained)
    mean, std = (_fit(found[name], channels) for name in ("mean", "std"))
    return Input((channels, *sides), mean, std, found["crop_pct"], found["interpolation"])


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        return None


def _fit(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """As many numbers as channels; of a gray image the mean of the three colours'."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def outputs_of(source: Source, given: Input) -> int:
    """How many classes the model tells apart, by a trial with one black image.

    Raises ValueError where it does not take such an image or does not give one row of numbers.
    """
    device = next(source.model.parameters()).device
    was_training = source.model.training
    try:
        with torch.no_grad():
            out = source.model.eval()(torch.zeros(1, *given.size, device=device))
    except Exception as error:
        raise ValueError(
            f"{source.name} must take images {list(given.size)}, got: {error}"
        ) from error
    finally:
        source.model.train(was_training)
    if not isinstance(out, Tensor) or out.ndim != 2:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{source.name} must give one number for each class, got {got}")
    return out.shape[1]


def masks_of(
    source: Source, masks: Mapping[str, Tensor] | str | os.PathLike[str] | None
) -> dict[str, Tensor]:
    """The masks that are held: those given, or the zeros of the prunable weights.

    Raises as `apply_masks`, and ValueError where none are given and there is no zero.
    """
    weights = dict(source.model.named_parameters(remove_duplicate=False))
    if isinstance(masks, (str, os.PathLike)):
        found = load_masks(masks)
        try:
            return fit_masks(found, weights)
        except ValueError as error:
            raise ValueError(f"{Path(masks)} must hold masks of {source.name}: {error}") from error
    if masks is not None:
        return fit_masks(masks, weights)
    modules = {n: layers for n, layers in find_modules(source.model).items() if n != AUX}
    names = [p for layers in modules.values() for layer in layers for p in layer.parameters]
    found = {name: weights[name].detach() != 0 for name in names}
    if all(bool(mask.all()) for mask in found.values()):
        raise ValueError(
            f"masks must be given, or {source.name} must be pruned, got no masks and weights "
            "without zeros (--dense holds none)"
        )
    return found
