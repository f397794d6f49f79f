"""A guess at where the cuts lie, from a small sample of each layer: never trusted, only quick.

A survey through narrow windows around the cuts costs little more than reading, and what falls into
them is few enough to be kept. A wrong guess costs another reading, never a wrong mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .. import ops

RUN = 128  # neighbouring weights that are read at a time
WHOLE = 1 << 15  # weights of a layer up to which all of it is read
RUNS = range(64, 256)  # in a layer
SHARE = 64  # one weight in this many, within RUNS
SIGMAS = 3.5  # half width of a window, in standard deviations
SHIFT = 17  # of the sample's histogram: 64 bins in an octave
NON_FINITE = 0x7F800000
BINS = 256  # of a window

Floats = NDArray[np.float64]
Keys = NDArray[np.uint32]


class Sketch(NamedTuple):
    """What a sample says of a layer; sketches of its parts can be merged.

    bins, weights, energies: histogram of the magnitude keys, bins rising.
    taken: weights in the sample; runs: how many it was read in, 0 for a whole layer.
    energy, kept: sums over the runs of their energy and of their share above a likely cut, and
        of the squares of both.
    """

    bins: NDArray[np.int64]
    weights: Floats
    energies: Floats
    taken: int
    runs: int
    energy: tuple[float, float]
    kept: tuple[float, float]


def keys_of(weights: torch.Tensor) -> Keys:
    """Magnitude keys, the bits of abs(w) as float32, of a flat tensor."""
    # Conversions keep denormals: they are integer work, or fast paths that do not flush.
    keys: Keys = weights.abs().float().numpy().view(np.uint32)
    return keys


def sketch(keys: Keys, ratio: float, *, whole: bool) -> Sketch:
    """keys: [runs, RUN], or [n] of a whole layer; ratio: the share of weights that is to be kept."""
    finite = keys[keys < NON_FINITE]
    if not finite.size:
        none = np.zeros(0)
        return Sketch(none.astype(np.int64), none, none, 0, 0, (0, 0), (0, 0))
    squares = np.square(finite.view(np.float32), dtype=np.float64)
    bins = (finite >> SHIFT).astype(np.int64)
    first = int(bins.min())
    counts = np.bincount(bins - first)
    energies: Floats = np.bincount(bins - first, squares).astype(np.float64)
    found = np.flatnonzero(counts)
    energy = kept = np.zeros(0)
    if not whole:
        values = np.where(keys < NON_FINITE, keys, 0).view(np.float32)
        energy = np.square(values, dtype=np.float64).sum(axis=1)
        cut = np.partition(finite, k := min(int((1 - ratio) * finite.size), finite.size - 1))[k]
        kept = (keys >= cut).mean(axis=1)
    return Sketch(
        found + first,
        counts[found].astype(np.float64),
        energies[found],
        finite.size,
        len(energy),
        (float(energy.sum()), float(np.square(energy).sum())),
        (float(kept.sum()), float(np.square(kept).sum())),
    )


def merge(parts: Sequence[Sketch]) -> Sketch:
    """The sketch of a layer from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    bins, place = np.unique(np.concatenate([p.bins for p in parts]), return_inverse=True)
    return Sketch(
        bins,
        _sums(place, [p.weights for p in parts]),
        _sums(place, [p.energies for p in parts]),
        sum(p.taken for p in parts),
        sum(p.runs for p in parts),
        (sum(p.energy[0] for p in parts), sum(p.energy[1] for p in parts)),
        (sum(p.kept[0] for p in parts), sum(p.kept[1] for p in parts)),
    )


def _sums(place: NDArray[np.intp], parts: Sequence[Floats]) -> Floats:
    return np.bincount(place, np.concatenate(parts)).astype(np.float64)


class _Curve:
    """How many weights of a layer score at least t, and the key they begin at, over -ln t."""

    def __init__(self, sketch: Sketch, total: int) -> None:
        self.total = total
        self.spread = _spread(sketch.runs, *sketch.kept)[0] * total  # of a count, 1 sigma
        # Inside a bin the curve is a straight line: of few weights it tells less than of many.
        line = 1e-3 if sketch.runs else 0.012
        self.slack = min(0.5, SIGMAS * _spread(sketch.runs, *sketch.energy)[1] / 2) + line
        scale = total / max(sketch.taken, 1)
        down = slice(None, None, -1)
        bins, counts = sketch.bins[down], sketch.weights[down] * scale
        energies = sketch.energies[down] * scale
        above, energy = np.cumsum(counts), np.cumsum(energies)
        edges = np.stack([bins + 1, bins], axis=1).reshape(-1)  # upper and lower of each bin
        values = _value(edges << SHIFT)
        sums = np.stack([energy - energies, energy], axis=1).reshape(-1)
        with np.errstate(all="ignore"):
            scores = np.minimum(values * values / np.maximum(sums, 1e-300), 1.0)
            x = -np.log(np.maximum(scores, 1e-300))
        self.x = np.maximum.accumulate(np.concatenate([[0.0], x, [700.0]]))
        kept = np.stack([above - counts, above], axis=1).reshape(-1)
        self.kept = np.concatenate([[0.0], kept, [float(total)]])
        self.keys = np.concatenate([[float(NON_FINITE)], (edges << SHIFT).astype(float), [0.0]])
        if len(edges):
            self.keys[0] = self.keys[1]

    def density(self, x: float) -> float:
        """Weights for each unit of ln(magnitude), roughly."""
        low, high = np.interp([x - 0.05, x + 0.05], self.x, self.kept)
        return float(high - low) * 20

    def key(self, x: float, factor: float) -> int:
        key = float(np.interp(x, self.x, self.keys))
        value = float(_value(np.array([int(key)]))[0]) * factor
        return int(np.float32(min(value, 3.4e38)).view(np.uint32))


def _spread(runs: int, total: float, squares: float) -> tuple[float, float]:
    """Standard deviation of a mean over runs: absolute, relative."""
    if runs < 2 or total <= 0:
        return 0.0, 0.0
    mean = total / runs
    deviation = (max(squares / runs - mean * mean, 0.0) / (runs - 1)) ** 0.5
    return deviation, deviation / mean


def _value(keys: NDArray[np.int64]) -> Floats:
    clipped = np.minimum(keys, NON_FINITE - 1).astype(np.uint32)
    return clipped.view(np.float32).astype(np.float64)


def guess(
    sketches: Sequence[Sketch], totals: Sequence[int], grains: Sequence[int], keep: int
) -> torch.Tensor:
    """Windows [layers, 5] of `BINS` bins for the layers of one scope, which keeps `keep` weights.

    grains: of each layer, log2 of the step between its magnitude keys.
    """
    total = sum(totals)
    if keep == 0:
        return rows([(0, 0)] * len(totals), grains)
    if keep == total:  # the smallest weight is the threshold, and no sample shows it
        return rows([(0, 23)] * len(totals), grains)
    curves = [_Curve(s, n) for s, n in zip(sketches, totals, strict=True)]
    x = _cross(curves, keep)
    variance = sum(c.spread**2 + (c.density(x) * c.slack / SIGMAS) ** 2 for c in curves)
    margin = SIGMAS * variance**0.5 + 1
    high, low = _cross(curves, keep - margin), _cross(curves, keep + margin)
    windows = []
    for curve, grain in zip(curves, grains, strict=True):
        last, first = curve.key(high, 1 + curve.slack) + 2, curve.key(low, 1 - curve.slack) - 2
        if last < 1 << SHIFT:  # zeros are cut: each in its own bin
            windows.append((0, 0))
            continue
        unit = 1 << grain
        if unit > 1:
            first, last = first // unit * unit - unit, (last // unit + 2) * unit
        windows.append(_window(max(first, 0), min(last, NON_FINITE)))
    return rows(windows, grains)


def rows(windows: Iterable[tuple[int, int]], grains: Iterable[int]) -> torch.Tensor:
    """Windows, (first key, shift) each, as `dimap.ops.survey` takes them."""
    listed = [
        [base, s, grain, *ops.NOTHING_KNOWN]
        for (base, s), grain in zip(windows, grains, strict=True)
    ]
    return torch.tensor(listed, dtype=torch.int64).reshape(-1, 3 + len(ops.NOTHING_KNOWN))


def _window(first: int, last: int) -> tuple[int, int]:
    for shift in range(24):
        base = first >> shift << shift
        if base + (BINS << shift) > last:
            return base, shift
    return 0, 23


def _cross(curves: Sequence[_Curve], count: float) -> float:
    """Where `count` weights score at least exp(-x)."""
    if count <= 0:
        return 0.0
    low, high = 0.0, 700.0
    for _ in range(5):
        grid = np.linspace(low, high, 64)
        kept = sum(np.interp(grid, c.x, c.kept) for c in curves)
        i = int(np.searchsorted(kept, count))
        low, high = grid[max(i - 1, 0)], grid[min(i, 63)]
    return float(high)
