"""Scope "row": of the weights that make one output of a layer, the largest are kept.

A row of a matrix [out, in] is one; of Conv1D's [in, out] a column; of a convolution [out, in, ...] all
of one output channel. Rows compete with nobody, so a mask needs only its row, and sorting one is
cheap: this is plain PyTorch, on any device, and exact as every mask is. Of n numbers in a row
``n - round(sparsity * n)`` are kept, of equal ones those of the lower index.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._errors import way_out
from .groups.nm import as_rows
from .groups.plan import kept_of

CHUNK = 1 << 24  # numbers that are looked at together, which takes some memory


def select_rows(name: str, values: Tensor, axis: int, sparsity: float) -> Tensor:
    """The mask of a tensor, whose numbers are ranked by their magnitude. name: for the error.

    Raises ValueError for a NaN or an infinity.
    """
    flip = values.ndim == 2 and axis == -2
    if not values.numel():
        return torch.empty(values.shape, dtype=torch.bool, device=values.device)
    count, length, _ = as_rows(values.shape, axis)
    rows = (values.t() if flip else values).reshape(count, length)
    keep = kept_of(length, sparsity)
    parts = []
    for part in rows.split(max(1, CHUNK // length)):
        part = part.detach().abs().float()  # exact, of all three types
        if not math.isfinite(part.amax()):
            bad = ~values.detach().isfinite().flatten()
            at = int(bad.int().argmax())
            got = float(values.detach().flatten()[at])
            problem = f"{name} must be finite, got {got} at flat index {at}"
            raise ValueError(problem + way_out(problem))
        parts.append(_largest(part, keep))
    mask = torch.cat(parts)
    return mask.t().contiguous() if flip else mask.view(values.shape)


def _largest(rows: Tensor, keep: int) -> Tensor:
    """The `keep` largest of each row [rows, n], of equal ones the first."""
    length = rows.shape[1]
    if not 0 < keep < length:
        return torch.full(rows.shape, keep > 0, device=rows.device)
    if rows.is_cuda:
        cut = rows.kthvalue(length - keep + 1, dim=1, keepdim=True).values
    else:  # numpy's is several times faster
        at = length - keep
        cut = torch.from_numpy(np.partition(rows.numpy(), at, axis=1)[:, at : at + 1].copy())
    mask = rows >= cut
    extra = mask.sum(dim=1) - keep
    for i in extra.nonzero().flatten().tolist():  # the last of those equal to the cut go
        mask[i, (rows[i] == cut[i]).nonzero().flatten()[-int(extra[i]) :]] = False
    return mask
