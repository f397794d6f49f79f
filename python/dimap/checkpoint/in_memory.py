"""What torch saved, and timm's models: pruned in memory as `dimap.prune` does it, and written anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..groups import wholes
from ..pruning import decide, has_nan, zero
from ..saliency import scaled
from .base import Checkpoint, Progress
from .bitmask import Format
from .state_dict import StateDict
from .streaming import StreamPruning, nan_notes


def fill_in_memory(
    checkpoint: Checkpoint,
    asked: Mapping[str, Any],
    norms: Mapping[str, Tensor] | None,
    targets: list[Path],
    out: Path,
    masks: Path | None,
    form: Format,
    result: StreamPruning,
    progress: Progress,
) -> None:
    """Prune what is in memory, write it, and complete the result.

    asked: arguments of `decide`, beside what the result says. norms: of the inputs, for Wanda.
    targets: the empty files, which will be `out`. masks: an empty file for the masks.
    """
    held = cast("StateDict", checkpoint)  # what is not streamed
    progress.step("pruning")
    state = {name: held.get(name) for name in wholes(result.shapes)}
    exact = asked["nm"] is not None and asked["sparsity"] is None
    scope, normalize = (None, None) if exact else (result.scope, result.normalize)
    saliency = None
    if norms is not None:
        saliency = {name: scaled(state[name], norm) for name, norm in norms.items()}
    pruning = decide(
        state, method="dimap", scope=scope, normalize=normalize, saliency=saliency, data=None,
        loss=None, choice=held.choice, **asked,
    )  # fmt: skip
    zero(pruning)
    held.mask_copies(pruning.masks)
    progress.step("writing")
    safetensors = out.suffix.lower() == ".safetensors"
    held.save(targets, safetensors=safetensors, pack=pruning.masks, form=form)
    if masks is not None:
        pruning.save_masks(masks)
    for told in ("thresholds", "kept", "sparsity", "notes", "nonzero", "smallest", "nm"):
        setattr(result, told, getattr(pruning, told))
    others = [n for n, x in held.tensors.items() if x.dtype.most and n not in pruning.masks]
    result.notes += nan_notes([n for n in others if has_nan(held.get(n))])
