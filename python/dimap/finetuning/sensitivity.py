"""The accuracy of a model of which one module alone is pruned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..groups import AUX, Choice, find_modules
from ..pruning import prune
from .data import make_loader, open_images
from .model import input_of, open_model, outputs_of
from .run import joined, need
from .settings import Settings
from .training import Trainer


def accuracy_alone(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    sparsities: Sequence[float],
    *,
    choice: Choice,
    device: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Top-1 in percent on the validation images: {"sparsities", "dense", "modules": {name: […]}}.

    model, data, device, options, errors: as in `finetune`. choice: which weights may be pruned.
    """
    settings = Settings(epochs=0, **options)
    for package in ("timm", "torchvision", "tqdm"):
        need(package)
    _, images, _ = open_images(data, settings)
    source = open_model(model, settings)
    given = input_of(source, settings)
    classes = outputs_of(source, given["input_size"])
    names = [name for name in find_modules(source.model, choice) if name != AUX]
    with joined(device) as (ranks, place):
        loader = make_loader(images, given, settings, ranks, place, training=False)
        trainer = Trainer(source.model, None, {}, classes, 0, ranks, place, settings)
        dense = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
        found: dict[str, Any] = {
            "sparsities": list(sparsities),
            "dense": trainer.evaluate(loader)["top1"],
            "modules": {},
        }
        for name in names:
            found["modules"][name] = tops = []
            for share in sparsities:
                prune(source.model, dict.fromkeys(names, 0.0) | {name: share}, patterns=choice)
                tops.append(trainer.evaluate(loader)["top1"])
                source.model.load_state_dict(dense)
    return found
