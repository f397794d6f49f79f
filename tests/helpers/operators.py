"""The operators beside their specification, in one call and in pieces."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from dimap import ops, reference
from problems import Problem
from torch import Tensor


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    view = torch.int32 if a.element_size() == 4 else torch.int16
    assert torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def assert_scores(got: Tensor, want64: Tensor) -> None:
    """Within 1 ulp of the reference rounded to float32."""
    got, want = got.cpu(), want64.float()
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    if got.numel():
        ulps = (got.contiguous().view(torch.int32) - want.contiguous().view(torch.int32)).abs()
        assert int(ulps.max()) <= 1


def check(problem: Problem, device: str, scores: list[Tensor] | None = None) -> None:
    if scores is None:
        scores = reference.score64(problem.weights, problem.layers)
    masks = reference.select_by(scores, problem.modules, problem.keep)
    weights = [w.to(device) for w in problem.weights]
    args = (problem.layers, problem.modules, problem.keep)
    for got, want in zip(ops.score(weights, problem.layers), scores, strict=True):
        assert_scores(got, want)
    got_masks, thresholds = ops.select_cuts(weights, *args)
    for got, want in zip(got_masks, masks, strict=True):
        assert got.dtype == torch.bool
        assert torch.equal(got.cpu(), want)
    for m, keep in enumerate(problem.keep):
        mine = [i for i, number in enumerate(problem.modules) if number == m]
        kept = torch.cat([scores[i][masks[i]] for i in mine]) if mine else torch.empty(0)
        assert kept.numel() == keep
        assert math.isnan(thresholds[m]) if keep == 0 else thresholds[m] == kept.min()
    for w, b in zip(weights, problem.weights, strict=True):
        assert_same_bits(w, b)
    pruned = [w.clone() for w in weights]
    ops.prune_(pruned, *args)
    applied = [w.clone() for w in weights]
    ops.apply_(applied, got_masks)
    for p, a, w, mask in zip(pruned, applied, problem.weights, masks, strict=True):
        want = torch.where(mask, w, torch.zeros_like(w))
        assert_same_bits(p, want)
        assert_same_bits(a, want)


def run_in_pieces(
    problem: Problem, cuts_at: list[int], bins: int, device: str
) -> list[torch.Tensor]:
    """Survey every tensor in pieces, add the tables up, solve, and emit piece by piece."""
    count = max(problem.layers) + 1
    rank = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
    dtypes = [torch.bfloat16] * count
    module_of = [0] * count
    for w, layer, module in zip(problem.weights, problem.layers, problem.modules, strict=True):
        dtypes[layer] = min(dtypes[layer], w.dtype, key=rank.__getitem__)
        module_of[layer] = module
    pieces = []  # tensor, piece
    for i, w in enumerate(problem.weights):
        flat = w.reshape(-1).to(device)
        bounds = sorted({0, flat.numel(), *(c % (flat.numel() + 1) for c in cuts_at)})
        pieces += [(i, flat[a:b]) for a, b in pairwise(bounds)]
    windows = ops.first_windows(dtypes, bins).to(device)
    for _ in range(20):
        tables = [ops.survey([p], [problem.layers[i]], windows, bins) for i, p in reversed(pieces)]
        tables.append(ops.survey([], [], windows, bins))
        table = torch.stack(tables).sum(0)
        cuts, quota, thresholds, windows = ops.solve(table, windows, module_of, problem.keep)
        if (quota >= 0).all():
            break
    else:
        raise AssertionError("not decided in twenty surveys")
    want = ops.select_cuts(*problem.args())[1]
    torch.testing.assert_close(thresholds.cpu(), want, rtol=0, atol=0, equal_nan=True)
    parts: list[list[torch.Tensor]] = [[] for _ in problem.weights]
    for i, piece in pieces:
        (mask,), quota = ops.emit([piece], [problem.layers[i]], [problem.modules[i]], cuts, quota)
        parts[i].append(mask.cpu())
    assert not quota.any()
    empty = torch.empty(0, dtype=torch.bool)
    return [
        torch.cat([empty, *p]).reshape(w.shape) for p, w in zip(parts, problem.weights, strict=True)
    ]
