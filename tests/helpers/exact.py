"""What must hold of masks and scores, asked in exact integers of weights far too many for reference.py.

A mask is right when each layer keeps its largest magnitudes, when no kept weight of a module scores below
a dropped one, and when ties are kept in order: only a few weights' scores are ever needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 25
VIEW = {2: torch.int16, 4: torch.int32}


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same ranges of flat tensors, piece by piece."""
    yield from zip(*(t.view(-1).split(CHUNK) for t in tensors), strict=True)


def keys_of(w: Tensor) -> Tensor:
    """Magnitudes as integers that rise with them."""
    mask = 0x7FFF if w.element_size() == 2 else 0x7FFFFFFF
    return w.view(VIEW[w.element_size()]) & mask


@cache
def value_of(key: int, dtype: torch.dtype) -> Fraction:
    bits = torch.tensor([key], dtype=VIEW[dtype.itemsize])
    return Fraction(bits.view(dtype).double().item())


def counts_of(w: Tensor) -> Tensor:
    """How many weights of each of the 32,768 magnitudes of a 16-bit type."""
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for (part,) in chunks(w):
        counts += torch.bincount(keys_of(part), minlength=1 << 15)
    return counts


class Layer:
    """The tensors of a layer, of one type. Tensors given more than once are looked at once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtype = tensors[0].dtype
        self.unique = {t.data_ptr(): t for t in tensors if t.numel()}
        self.times = {p: sum(t.data_ptr() == p for t in tensors if t.numel()) for p in self.unique}
        self._counts = (
            {p: counts_of(t) for p, t in self.unique.items()} if self.dtype.itemsize == 2 else None
        )
        self.score = cache(self._score)

    def energy(self, key: int) -> Fraction:
        """The exact sum of squares of all weights with at least this key."""
        total = Fraction(0)
        for p, tensor in self.unique.items():
            if self._counts is not None:
                found = self._counts[p].nonzero().flatten()
                one = sum(
                    (
                        value_of(k, self.dtype) ** 2 * int(self._counts[p][k])
                        for k in found[found >= key].tolist()
                    ),
                    start=Fraction(0),
                )
            else:
                one = sum((_energy32(part, key) for (part,) in chunks(tensor)), start=Fraction(0))
            total += self.times[p] * one
        return total

    def _score(self, key: int) -> float:
        """score64: S is rounded once to float64, and so is the quotient."""
        w2 = value_of(key, self.dtype) ** 2
        return float(w2) / float(self.energy(key)) if w2 else 0.0


def _energy32(w: Tensor, key: int) -> Fraction:
    keys = keys_of(w)
    keys = keys[keys >= key]
    exponent = (keys >> 23).clamp(min=1)
    m = ((keys & 0x7FFFFF) | torch.where(keys >= 1 << 23, 1 << 23, 0)).long()
    square = m * m
    total = 0
    for shift, part in ((0, square & 0xFFFFFF), (24, square >> 24)):  # sums below 2^49: exact
        sums = torch.bincount(exponent, weights=part.double(), minlength=256)
        total += sum(int(s) << (2 * e + shift) for e, s in enumerate(sums.tolist()))
    return Fraction(total, 1 << 300)


def assert_masks(
    weights: Sequence[Tensor],
    layers: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
    masks: Sequence[Tensor],
) -> None:
    """Every weight's decision, against exact scores where it matters."""
    known = {
        layer: Layer([w for w, number in zip(weights, layers, strict=True) if number == layer])
        for layer in set(layers)
    }
    module_of = dict(zip(layers, modules, strict=True))
    least_kept: dict[int, int] = {}
    most_dropped: dict[int, int] = {}
    kept = [0] * len(keep)
    for w, mask, layer, module in zip(weights, masks, layers, modules, strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == w.shape
        top = (1 << 8 * w.element_size() - 1) - 1
        for part, bits in chunks(w, mask) if w.numel() else ():
            assert int(bits.view(torch.uint8).max()) <= 1
            keys = keys_of(part)
            low = int(torch.where(bits, keys, top).min())
            high = int(torch.where(bits, -1, keys).max())
            kept[module] += int(bits.count_nonzero())
            least_kept[layer] = min(least_kept.get(layer, top), low)
            most_dropped[layer] = max(most_dropped.get(layer, -1), high)
    assert kept == list(keep)
    for module in range(len(keep)):
        mine = [layer for layer in least_kept if module_of[layer] == module]
        at_least, at_most = math.inf, -math.inf
        ties: dict[
            int, int
        ] = {}  # layer -> the magnitude that is kept in part, or scores as another's
        for layer in mine:
            top = (1 << 8 * known[layer].dtype.itemsize - 1) - 1
            assert least_kept[layer] >= most_dropped[layer], f"layer {layer} drops a larger weight"
            if least_kept[layer] != top:
                at_least = min(at_least, known[layer].score(least_kept[layer]))
            if most_dropped[layer] >= 0:
                at_most = max(at_most, known[layer].score(most_dropped[layer]))
        assert at_least >= at_most, f"module {module} keeps {at_least}, drops {at_most}"
        if at_least > at_most:
            continue
        for layer in mine:
            for key in {least_kept[layer], most_dropped[layer]}:
                top = (1 << 8 * known[layer].dtype.itemsize - 1) - 1
                if 0 <= key < top and known[layer].score(key) == at_least:
                    ties[layer] = key
        dropped = False  # ties are kept until one is dropped
        for w, mask, layer in zip(weights, masks, layers, strict=True):
            if layer not in ties or not w.numel():
                continue
            for part, bits in chunks(w, mask):
                tied = bits[keys_of(part) == ties[layer]].to(torch.int8)
                assert not (dropped and bool(tied.any())), "a tie was kept after one was dropped"
                assert bool((tied[1:] <= tied[:-1]).all()), "a tie was kept after one was dropped"
                dropped = dropped or bool((tied == 0).any())


def assert_pruned(
    weights: Sequence[Tensor], masks: Sequence[Tensor], pruned: Sequence[Tensor]
) -> None:
    """Kept bits are the same, dropped ones are zero."""
    for w, mask, p in zip(weights, masks, pruned, strict=True):
        view = VIEW[w.element_size()]
        for a, bits, b in chunks(w, mask, p) if w.numel() else ():
            assert torch.equal(a.view(view) * bits, b.view(view))


def assert_scores16(weights: Sequence[Tensor], scores: Sequence[Tensor], times: int = 1) -> None:
    """Scores of one layer of a 16-bit type, within 1 ulp of the exact ones; times: the layer has them as often."""
    counts = times * sum(counts_of(w) for w in weights)
    table = torch.zeros(1 << 15)
    energy = Fraction(0)
    for key in counts.nonzero().flatten().flip(0).tolist():
        w2 = value_of(key, weights[0].dtype) ** 2
        energy += w2 * int(counts[key])
        table[key] = float(w2) / float(energy) if w2 else 0.0
    for w, score in zip(weights, scores, strict=True):
        for part, got in chunks(w, score):
            want = table[keys_of(part).int()]
            assert int((got.view(torch.int32) - want.view(torch.int32)).abs().max()) <= 1


def assert_scores(weights: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    """Scores of one layer of any types, within 1 ulp, by a sort and sums in extended precision."""
    flat = torch.cat([w.detach().double().abs().flatten() for w in weights])
    ranked, order = flat.sort(descending=True)
    values, counts = (x.numpy() for x in ranked.unique_consecutive(return_counts=True))
    squares = values.astype(np.longdouble) ** 2
    energy = np.cumsum(ranked.numpy().astype(np.longdouble) ** 2)[np.cumsum(counts) - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients = np.where(values > 0, squares / energy, 0).astype(np.float64)
    want = np.empty(len(ranked))
    want[order.numpy()] = np.repeat(quotients, counts)
    got = np.concatenate([s.flatten().numpy() for s in scores])
    assert got.dtype == np.float32
    ulps = np.abs(got.view(np.int32) - want.astype(np.float32).view(np.int32))
    assert int(ulps.max(initial=0)) <= 1, f"{int((ulps > 1).sum())} scores off, by {ulps.max()} ulp"
