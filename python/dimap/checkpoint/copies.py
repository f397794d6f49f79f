"""Other copies of the weights: averages, teachers, earlier checkpoints. They can be given the same masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._errors import Damaged
from ..groups import is_parameter, without_buffers
from ..groups.known import bare
from ..masks import apply_masks, load_masks

if TYPE_CHECKING:
    from .base import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]


def tensors_of(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """What is a tensor under a name, among whatever else lies beside it."""
    return {n: v for n, v in state.items() if isinstance(n, str) and isinstance(v, Tensor)}


def matrices(state: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what could be pruned: tensors of two or more dimensions."""
    return {name: tuple(t.shape) for name, t in tensors_of(state).items() if t.ndim > 1}


def alike(mine: Shapes, theirs: Shapes) -> bool:
    """Whether two are copies: most of the matrices have the same shapes and ends of names.

    What stands before a name may differ, as in a teacher, and so may a head.
    """
    ends = [
        Counter((*bare(name).split(".")[-4:], shape) for name, shape in shapes.items())
        for shapes in (mine, theirs)
    ]
    return 2 * (ends[0] & ends[1]).total() > len(mine)


def under_names(
    listed: Mapping[str, Tensor], state: Mapping[str, Any], where: str
) -> Mapping[str, Tensor]:
    """The parameters in a list, as averages are kept, under the names that they have in `state`.

    They must stand in the same order. Returns `listed` where it holds other weights; raises ValueError
    where it holds most of these in another order, or without some.
    """
    found = without_buffers(matrices(state))
    mine = {n: s for n, s in found.items() if is_parameter(n, state[n].is_floating_point())}
    theirs = matrices(listed)
    if list(mine.values()) == list(theirs.values()):
        return {name: listed[number] for name, number in zip(mine, theirs, strict=True)}
    same = Counter(mine.values()) & Counter(theirs.values())
    if 2 * same.total() > len(mine):
        raise ValueError(
            f"{where} must hold the {len(mine)} matrices of the weights in their order to be given the "
            f"same masks, or be left out by --key, got {len(theirs)}, others or in another order"
        )
    return listed


def mask_others(checkpoint: Checkpoint, output: Path, masks: Path) -> list[str]:
    """Mask what among the other files of a folder is a copy of the weights, in the folder `output`.

    masks: the file of masks. Returns a note for each of `checkpoint.others`.
    """
    from . import open_checkpoint
    from .shards import Shards

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
            if isinstance(copy, Shards) and copy.packed:
                raise ValueError("they are stored as bits and values")
            if not alike(shapes, {n: spec.torch_shape for n, spec in copy.tensors.items()}):
                raise ValueError("its tensors have other names or shapes")
        except Damaged:  # it may have been one
            raise
        except ValueError as error:
            notes.append(f"{name} is kept as it is: its weights are not pruned ({error})")
            continue
        state = {n: copy.get(n) for n in copy.tensors}
        try:
            apply_masks(state, kept)
        except ValueError as error:
            raise ValueError(
                f"{path} must be a whole copy to be given the same masks, or be left out by giving the "
                f"file of weights in place of the folder: {error}"
            ) from error
        done.update(copy.files)
        targets = [output / file.relative_to(folder) for file in copy.files]
        for target in targets:
            target.unlink()  # it may be read-only like the original
        copy.rewrite(targets, state, kept)
        notes.append(f"{name}, a copy of these weights, is given the same masks")
    return notes
