"""Other copies of the weights: averages, teachers, earlier checkpoints. They can be given the same masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..groups.known import bare
from ..masks import load_masks

if TYPE_CHECKING:
    from .base import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]


def matrices(state: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what could be pruned: tensors of two or more dimensions."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.ndim > 1
    }


def partners(mine: Shapes, theirs: Shapes) -> dict[str, str]:
    """Which of their tensors stands for which of mine: same shape, same name but for what is before it."""
    by_name = {bare(name): name for name in theirs}
    first = bare(next(iter(mine), ""))
    found: dict[str, str] = {}
    before = {("", "")}  # what names of mine begin with, and theirs
    before |= {("", name[: -len(first)]) for name in by_name if name.endswith(f".{first}")}
    before |= {(first[: -len(name)], "") for name in by_name if first.endswith(f".{name}")}
    for own, other in sorted(before):
        pairs = ((n, by_name.get(other + bare(n).removeprefix(own))) for n in mine)
        same = {n: p for n, p in pairs if p is not None and theirs[p] == mine[n]}
        found = max(found, same, key=len)
    return found


def alike(mine: Shapes, theirs: Shapes) -> bool:
    """Whether most of the matrices have partners: two copies, of which one may have another head."""
    return 2 * len(partners(mine, theirs)) > len(mine)


def mask_state(state: Mapping[str, Any], masks: Mapping[str, Tensor], where: str) -> None:
    """Set to zero in a copy what the masks drop. Raises ValueError where it lacks one of the weights."""
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    names = partners(shapes, matrices(state))
    if missing := [name for name in masks if name not in names]:
        raise ValueError(
            f"{where} must have every pruned weight to be given the same masks, got none for {missing[0]}"
        )
    with torch.no_grad():
        for name, mask in masks.items():
            state[names[name]].masked_fill_(~mask, 0)


def mask_others(checkpoint: Checkpoint, output: Path, masks: Path) -> list[str]:
    """Mask what among the other files of a folder is a copy of the weights, in the folder `output`.

    masks: the file of masks. Returns a note for each of `checkpoint.others`.
    """
    from . import open_checkpoint

    folder, kept = checkpoint.files[0].parent, load_masks(masks)
    shapes = {name: tuple(mask.shape) for name, mask in kept.items()}
    notes: list[str] = []
    done: set[Path] = set()
    for name in checkpoint.others:
        path = folder / name
        if path in done:
            continue
        sharded = path.parent != folder and list(path.parent.glob("*.index*.json"))
        try:
            copy = open_checkpoint(path.parent if sharded else path, all_copies=True)
            if not alike(shapes, {n: spec.torch_shape for n, spec in copy.tensors.items()}):
                raise ValueError("they are no copy of these")
            state = {n: copy.get(n) for n in copy.tensors}
        except (ValueError, OSError) as error:
            notes.append(f"{name} is kept as it is: its weights are not pruned ({error})")
            continue
        done.update(copy.files)
        mask_state(state, kept, name)
        targets = [output / file.relative_to(folder) for file in copy.files]
        for target in targets:
            target.unlink()  # it may be read-only like the original
        copy.rewrite(targets, state, kept)
        notes.append(f"{name}, a copy of these weights, is given the same masks")
    return notes
