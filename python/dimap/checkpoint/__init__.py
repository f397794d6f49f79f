"""Checkpoints in and out: files and folders of safetensors or of torch.save, and timm models.

A `Checkpoint` lists names, shapes and dtypes and gives tensors one at a time. Only weights change
in an output: metadata, index, optimizer state and a folder's other files are carried over.

    with open_checkpoint("in.safetensors") as checkpoint:
        for name, spec in checkpoint.tensors.items():
            print(name, spec.shape, checkpoint.get(name))

What each file here is for: docs/architecture.md.
"""

from __future__ import annotations

import os
from pathlib import Path

from .._errors import first_line, need
from .._hub import reaching_hub
from .base import Checkpoint
from .header import Spec
from .locate import PICKLED, SAFETENSORS, find_weights, other_weights
from .shards import Shards

__all__ = ["PICKLED", "Checkpoint", "Spec", "open_checkpoint"]

TIMM, HUB = "timm:", "hf:"  # how names begin that are no paths


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    all_copies: bool = False,
    random_init: bool = False,
) -> Checkpoint:
    """Open a checkpoint for reading; use it in a `with` block.

    path: a file of safetensors or of torch.save (read with weights_only=True), told by its content;
        a folder with model.safetensors, pytorch_model.bin, another file of weights or an index and
        its shards; "hf:ORG/NAME", a repository of the Hugging Face hub or its cache; or
        "timm:NAME", a timm model with pretrained weights.
    key: where the weights lie in a file of torch.save, as "state_dict" or "net.teacher"; by default
        where training scripts put them ("model", "state_dict", …), or the one place that has any.
    all_copies: take other copies of the weights there, as a teacher's, to be pruned alike; by default
        averages (EMA) are taken, and others must be left out by `key`.
    random_init: give a timm model fresh weights (seed 0) instead, for a dry run.

    Raises FileNotFoundError or another OSError where a file cannot be read; ValueError where it is
    not what it should be, is one of a checkpoint's shards, or holds weights in several places;
    ModuleNotFoundError where timm or huggingface_hub is needed and missing.
    """
    text = os.fspath(path)
    if random_init and not text.startswith(TIMM):
        raise ValueError(f"random weights (--random-init) are only for timm:NAME, got {text}")
    if text.startswith(TIMM):
        from .state_dict import open_timm

        return open_timm(text, random_init=random_init)
    file = _from_hub(text) if text.startswith(HUB) else Path(text)
    found = find_weights(file)
    if found.form == SAFETENSORS:
        if key is not None:
            raise ValueError(
                f"key (--key) must be left out for safetensors, which hold one set of weights, got {key}"
            )
        form = "folder" if file.is_dir() else SAFETENSORS
        checkpoint: Checkpoint = Shards(text, form, found)
    else:
        from .state_dict import open_pickled

        form = "pickled folder" if file.is_dir() else "pickled"
        checkpoint = open_pickled(text, form, found, key, all_copies)
    if file.is_dir():
        checkpoint.others = other_weights(file, found.files)
        if not all_copies:
            checkpoint.notes += [
                f"{name} is kept as it is: its weights are not pruned" for name in checkpoint.others
            ]
    return checkpoint


def _from_hub(text: str) -> Path:
    """The folder of "hf:ORG/NAME", or of "hf:ORG/NAME@REVISION", in the hub's cache."""
    name, _, revision = text.removeprefix(HUB).partition("@")
    hub = need("huggingface_hub", "hf:ORG/NAME needs")
    try:
        with reaching_hub("hf:ORG/NAME needs"):
            return Path(hub.snapshot_download(name, revision=revision or None))
    except Exception as error:  # its own kinds, and those of what it loads with
        problem = f"{text} is not in the hub's cache and could not be downloaded"
        raise OSError(f"{problem}: {first_line(error)}") from error
