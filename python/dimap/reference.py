"""The specification, in plain torch float64: slow, exact, and what every kernel is tested against.

S(w) is summed with `math.fsum`, whose result is the exact sum rounded once: the square of a
float32, bfloat16 or float16 value is exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor


def score64(weights: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """score64 of every weight: w² over the energy of its layer's weights at least as large."""
    scores = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    for layer in set(layers):
        members = [i for i, number in enumerate(layers) if number == layer]
        flat = torch.cat([weights[i].detach().cpu().double().flatten() for i in members])
        values, inverse, counts = torch.unique(flat.abs(), return_inverse=True, return_counts=True)
        squares = (values * values).tolist()
        energies = [0.0] * len(squares)
        partials: list[float] = []  # the exact sum so far, as non-overlapping floats
        for k in reversed(range(len(squares))):
            _add(partials, squares[k], int(counts[k]))
            energies[k] = math.fsum(partials)
        table = torch.tensor(
            [s / e if s else 0.0 for s, e in zip(squares, energies, strict=True)],
            dtype=torch.float64,
        )
        parts = table[inverse].split([weights[i].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            scores[i] = part.view(weights[i].shape)
    return scores


def _add(partials: list[float], value: float, times: int) -> None:
    """Add ``times * value`` to an exact sum kept as non-overlapping floats (Shewchuk 1997)."""
    terms = [math.ldexp(value, b) for b in range(times.bit_length()) if times >> b & 1]
    for term in terms:
        i = 0
        for partial in partials:
            x, y = (term, partial) if abs(term) >= abs(partial) else (partial, term)
            term = x + y
            rest = y - (term - x)
            if rest:
                partials[i] = rest
                i += 1
        partials[i:] = [term]


def keep_counts(totals: Sequence[int], sparsity: Sequence[float]) -> list[int]:
    """How many weights each module keeps: ``N - round(sparsity * N)``, with Python's round."""
    return [n - round(s * n) for n, s in zip(totals, sparsity, strict=True)]


def select(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> list[Tensor]:
    """The masks: in each module the `keep` weights of highest score64, ties to the first in order."""
    return select_by(score64(weights, layers), modules, keep)


def select_by(
    scores: Sequence[Tensor], modules: Sequence[int], keep: Sequence[int]
) -> list[Tensor]:
    """The masks for scores at hand."""
    masks = [torch.zeros(s.shape, dtype=torch.bool) for s in scores]
    for module, count in enumerate(keep):
        members = [i for i, number in enumerate(modules) if number == module]
        if not members:
            continue
        flat = torch.cat([scores[i].flatten() for i in members])
        order = torch.sort(flat, descending=True, stable=True).indices
        kept = torch.zeros(flat.shape, dtype=torch.bool)
        kept[order[:count]] = True
        for i, part in zip(members, kept.split([scores[i].numel() for i in members]), strict=True):
            masks[i] = part.view(scores[i].shape)
    return masks


def select_nm(weights: Sequence[Tensor], n: int, m: int, dim: int = -1) -> list[Tensor]:
    """The masks of N:M: of every `m` weights in turn along `dim` the `n` of largest magnitude.

    Of equal magnitudes the one of the lower index is kept; zeros are the smallest, and -0 is 0. The
    size along `dim` is a multiple of `m`.
    """
    masks = []
    for w in weights:
        along = w.detach().cpu().double().abs().movedim(dim, -1)
        groups = along.unflatten(-1, (along.shape[-1] // m, m))
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        kept = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, order[..., :n], True)
        masks.append(kept.flatten(-2).movedim(-1, dim).contiguous())
    return masks


def nm_counts(kept: Sequence[int], sizes: Sequence[int], m: int) -> list[int]:
    """The N of each layer of a scope for N:M "auto", whose layers keep `kept` of `sizes` weights.

    Each layer's share of `m` is rounded down or up. Of all ways, tried one by one: the one whose
    total is nearest to the scope's; of several, the one with the least sum of weights that layers keep
    more or less than they should; then the first that rounds up the earlier layers.
    """
    down = [k * m // s if s else m for k, s in zip(kept, sizes, strict=True)]
    exact = [n * s == k * m for n, k, s in zip(down, kept, sizes, strict=True)]
    ways = product(
        *([n] if e or not s else [n + 1, n] for n, e, s in zip(down, exact, sizes, strict=True))
    )

    def order(way: Iterable[int]) -> tuple[int, int]:
        errors = [n * s - k * m for n, k, s in zip(way, kept, sizes, strict=True)]
        return abs(sum(errors)), sum(map(abs, errors))

    return list(min(ways, key=order))


def wanda(weights: Tensor, norms: Tensor) -> Tensor:
    """``|w| · ‖x‖`` of float32 numbers: their product is exact in float64, and rounded once."""
    return (weights.double().abs() * norms.double()).float()


def select_rows(values: Tensor, sparsity: float) -> Tensor:
    """The mask of a matrix [rows, n]: in each row the largest magnitudes, ties to the first."""
    rows = [row.abs() for row in values]
    keep = [len(row) - round(sparsity * len(row)) for row in rows]
    masks = select_by(rows, range(len(rows)), keep)
    return torch.stack(masks) if masks else torch.empty(values.shape, dtype=torch.bool)


def select_limited(
    weights: Sequence[Tensor],
    layers: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
    sets: Sequence[int],
    limits: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """`select`, where the tensors of a set together keep at least and at most so many of their weights.

    The weights of a module are taken in their order, best first, and each set counts its own; a set
    that has counted fewer than its least gets the least, one that has counted more than its most the
    most. The walk ends where these add up to `keep`; of each set its own best weights are kept.

    sets: the set of each tensor, of one module. limits: of each set, the least and the most.

    Raises ValueError where they never add up.
    """
    scores = score64(weights, layers)
    masks = [torch.zeros(w.shape, dtype=torch.bool) for w in weights]
    for module, count in enumerate(keep):
        members = [i for i, number in enumerate(modules) if number == module]
        flat = torch.cat([torch.empty(0).double(), *(scores[i].flatten() for i in members)])
        owner = [sets[i] for i in members for _ in range(weights[i].numel())]
        order = torch.sort(flat, descending=True, stable=True).indices.tolist()
        counted = dict.fromkeys((sets[i] for i in members), 0)

        def clipped(counted: dict[int, int]) -> dict[int, int]:
            return {s: min(max(n, limits[s][0]), limits[s][1]) for s, n in counted.items()}

        walk = iter(order)
        while (got := sum(clipped(counted).values())) != count:
            following = next(walk, None)
            if got > count or following is None:
                raise ValueError(f"keep[{module}] must be in what the limits allow, got {count}")
            counted[owner[following]] += 1
        left = clipped(counted)
        kept = torch.zeros(flat.shape, dtype=torch.bool)
        for position in order:
            if left[owner[position]] > 0:
                left[owner[position]] -= 1
                kept[position] = True
        for i, part in zip(members, kept.split([weights[i].numel() for i in members]), strict=True):
            masks[i] = part.view(weights[i].shape)
    return masks
