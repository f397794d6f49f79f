"""Safetensors pruned row by row (scope "row"), by magnitude or by Wanda with norms of a file; N:M by Wanda.

Rows and groups know nothing of each other, so one tensor is read, masked and written after the other:
memory is a few times the largest tensor, whatever the checkpoint. This needs torch, as `streaming` does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..groups import AUX, Slice, part_of, whole
from ..groups.plan import Plan, renamed
from ..masks import pack
from ..ops import select_nm
from ..rows import select_rows
from ..saliency import fit_norms, scaled
from .base import Progress, raw_bytes
from .native import FILL, begin, opened
from .streaming import StreamPruning, masks_header, nan_notes

if TYPE_CHECKING:
    from torch import Tensor

    from .shards import Shards


def fill_by_rows(
    checkpoint: Shards,
    plan: Plan,
    norms: Mapping[str, Tensor] | None,
    targets: list[Path],
    masks: Path | None,
    result: StreamPruning,
    progress: Progress,
) -> None:
    """Write the outputs and complete the result. norms: of the inputs, or None for magnitudes."""
    from ..pruning import count_nonzero, has_nan

    if plan.nm is not None:
        result.nm = {name: f"{n}:{plan.nm.m}" for name, n in plan.counts().items()}
    fitted = {}
    if norms is not None:
        fitted = fit_norms(norms, checkpoint.shapes(), list(dict.fromkeys(map(whole, plan.names))))
    parts: dict[str, list[tuple[str, int, float]]] = {}
    for each in zip(plan.names, plan.axes, plan.of_rows(result.sparsity), strict=True):
        parts.setdefault(whole(each[0]), []).append(each)
    nans: list[str] = []
    kept, nonzero, smallest = Counter[str](), Counter[str](), dict[str, float]()

    def masked(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for part, axis, share in parts[name]:
            weights = part_of({name: tensor}, part)
            label, values = part, weights
            if norms is not None:
                by = fitted[name]
                at = by[part.at if len(by) > 1 else 0] if isinstance(part, Slice) else by
                label, values = f"saliency of {part}", scaled(weights, at)
            if plan.nm is not None and plan.nm.n is not None:
                with renamed([label]):
                    [mask] = select_nm([values], plan.nm.n, plan.nm.m, axis)
            else:
                mask = select_rows(label, values, axis, share)
            left = weights[mask]
            for counted in (part, name) if part != name else (name,):
                kept[counted] += len(left)
                nonzero[counted] += count_nonzero(left)
            if len(left):
                smallest[part] = float(left.abs().amin())
            found.append(mask)
        mask = torch.stack(found) if isinstance(parts[name][0][0], Slice) else found[0]
        return mask, torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))

    progress.step("pruning", sum(e.nbytes for e in checkpoint.tensors.values()))
    with ExitStack() as files:
        bits, begins = -1, dict[str, int]()
        if masks is not None:
            (output,) = files.enter_context(opened([masks], FILL))
            header = masks_header(plan, result)
            begin(output, header)
            bits, begins = output[0], {e.name: e.begin for e in header.entries}
        for shard, target in zip(checkpoint.shards, targets, strict=True):
            with open(target, "wb") as file:
                file.write(shard.header.raw)
                for entry in shard.header.entries:
                    tensor = shard.get(entry.name)
                    if entry.name in parts:
                        mask, tensor = masked(entry.name, tensor)
                        if masks is not None:
                            os.pwrite(bits, raw_bytes(pack(mask)), begins[entry.name])
                    else:
                        if entry.name in result.shapes:
                            nonzero[entry.name] = count_nonzero(tensor)
                        if entry.dtype.most and has_nan(tensor):
                            nans.append(entry.name)
                    file.write(raw_bytes(tensor))
                    progress.advance(entry.nbytes)
    result.notes += nan_notes(nans)
    result.kept = {name: kept[name] for name in [*parts, *plan.names]}
    result.nonzero = {name: nonzero[name] for name in result.shapes}
    for layer in (x for m, layers in plan.modules.items() if m != AUX for x in layers):
        found = [smallest[part] for part in layer.parameters if part in smallest]
        if found:
            result.smallest.update(dict.fromkeys(layer.parameters, min(found)))
