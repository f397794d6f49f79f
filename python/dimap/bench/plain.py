"""The same jobs in plain PyTorch: the yardsticks.

Written as a user would: sort, cumsum, divide, scatter; topk; compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def score(weights: Sequence[Tensor]) -> list[Tensor]:
    """Every weight's score, each tensor a layer (Eq. 10 of the DIMAP paper)."""
    scores = []
    for w in weights:
        squares = w.flatten().float() ** 2
        ordered, order = torch.sort(squares, descending=True)
        energy = torch.cumsum(ordered, 0)
        scores.append(torch.empty_like(squares).scatter_(0, order, ordered / energy).view(w.shape))
    return scores


def select(weights: Sequence[Tensor], modules: Sequence[int], keep: Sequence[int]) -> list[Tensor]:
    """The masks: the `keep` highest scores of each module, by topk and compare."""
    scores = score(weights)
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    for module, count in enumerate(keep):
        members = [i for i, m in enumerate(modules) if m == module]
        if count == 0:
            continue
        flat = torch.cat([scores[i].flatten() for i in members])
        threshold = torch.topk(flat, count, sorted=False).values.min()
        for i in members:
            masks[i] = scores[i] >= threshold
    return masks


def global_unstructured(weights: Sequence[Tensor], amount: float) -> None:
    """torch.nn.utils.prune.global_unstructured by magnitude: what torch itself offers."""
    holders = []
    for w in weights:
        holder = nn.Module()
        holder.weight = nn.Parameter(w, requires_grad=False)
        holders.append((holder, "weight"))
    prune.global_unstructured(holders, prune.L1Unstructured, amount=amount)
