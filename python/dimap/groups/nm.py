"""N:M by names and shapes: which axis of a weight is its input, which layers fit, which N each gets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, prod

from .choice import set_aside
from .layers import Modules, Shape, Slice, claimed, part_shape, prunable, whole

LARGEST = 16  # weights of a group


@dataclass(frozen=True)
class NM:
    """Of every `m` weights along the input `n` are kept; None: which, each layer's kept share says."""

    n: int | None
    m: int

    @staticmethod
    def parse(text: str | None) -> NM | None:
        """From "2:4", "auto" (of 4) or "auto:8". Raises ValueError for anything else."""
        if text is None:
            return None
        found = (
            re.fullmatch(r"(\d+):(\d+)|auto(?::(\d+))?", text) if isinstance(text, str) else None
        )
        m = int(found[2] or found[3] or 4) if found else 0
        n = int(found[1]) if found and found[1] else None
        if not 2 <= m <= LARGEST or not 0 < (n or 1) <= m or n == 0:
            raise ValueError(
                f"nm (--nm) must be N:M with N from 1 to M and M from 2 to {LARGEST}, as in 2:4, or "
                f"auto, or auto:M, got {text!r}"
            )
        return NM(n, m)

    def refuse(self, **given: object) -> None:
        """Refuse what a fixed N of M leaves nothing to say of. Raises ValueError."""
        for name, value in given.items():
            if self.n is not None and value is not None and value != {}:
                raise ValueError(
                    f"{name} must be left out with nm {self}, where every group keeps {self.n}, "
                    f"got {value!r}"
                )

    def __str__(self) -> str:
        return f"{'auto' if self.n is None else self.n}:{self.m}"


def input_axes(modules: Modules, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The input axis of each tensor of a layer to prune, counted from its end.

    Linear's [out, in] is -1, Conv1D's [in, out] -2, and of a convolution [out, in, ...] it is the
    second. Names do not tell the two kinds of matrices apart: GPT-2's and nanoGPT's are alike. Their
    bias does, which has the output's length; and of experts stacked without biases, what one of
    them writes and the block's first one reads has the same width. A matrix that says nothing, a
    square one say, is [in, out] where all others of its tower (of experts: its experts) say so.
    """
    said: dict[str, int] = {}  # -2 or -1
    kin: dict[str, tuple[str, bool]] = {}
    for layer in prunable(modules):
        for name in layer.parameters:
            shape = part_shape(shapes, name)
            if len(shape) != 2:
                continue
            kin[name] = layer.tower, isinstance(name, Slice)
            bias = next((shapes[b][-1] for b in _biases(name) if shapes.get(b)), None)
            if shape[0] != shape[1] and bias in shape:
                said[name] = -2 if bias == shape[1] else -1
    for first, second in _experts(modules):
        (a, b), (c, d) = part_shape(shapes, first), part_shape(shapes, second)
        if (b == c) != (a == d):  # width read, width written
            for name in (first, second):
                said.setdefault(name, -1 if b == c else -2)
    alike: dict[tuple[str, bool], set[int]] = {}
    for name, axis in said.items():
        alike.setdefault(kin[name], set()).add(axis)
    axes = {n: said.get(n, -2 if alike.get(kin[n]) == {-2} else -1) for n in kin}
    for layer in prunable(modules):
        for name in layer.parameters:
            axes.setdefault(name, min(1 - len(part_shape(shapes, name)), -1))
    return axes


def _biases(name: str) -> list[str]:
    """What the bias of a weight may be called."""
    stem = whole(name).removesuffix("weight")
    return [f"{stem}bias", f"{whole(name)}_bias"]


def _experts(modules: Modules) -> list[tuple[str, str]]:
    """The first two stacked tensors of each block and expert: what reads, what writes."""
    found: dict[tuple[object, ...], list[str]] = {}
    for layer in prunable(modules):
        for name in layer.parameters:
            if isinstance(name, Slice):
                place = (layer.tower, layer.stage, layer.block, name.at)
                found.setdefault(place, []).append(name)
    return [(names[0], names[1]) for names in found.values() if len(names) == 2]


def leave_ragged(
    modules: Modules, shapes: Mapping[str, Shape], m: int
) -> tuple[Modules, dict[str, int], list[str]]:
    """Modules with the layers that groups of `m` do not fit in "aux", the others' axes, and notes.

    Raises ValueError where no layer fits.
    """
    axes = input_axes(modules, shapes)

    def length(name: str) -> int:
        return part_shape(shapes, name)[axes[name]]

    layers = prunable(modules)
    ragged = [x for x in layers if any(length(name) % m for name in x.parameters)]
    if not ragged:
        return modules, axes, []
    first = ragged[0].parameters[0]
    told = f"{len(ragged)} layers, {ragged[0].name} with {length(first)} inputs the first"
    if len(ragged) == len(layers):
        raise ValueError(
            f"nm (--nm) needs layers whose inputs are a multiple of {m}, got none: {told}"
        )
    note = f"left dense, since {m} does not divide their inputs: {told}"
    return set_aside(modules, shapes, claimed(ragged)), axes, [note]


def as_groups(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """A tensor's shape as [outer, length, inner], length being that of an axis counted from the end."""
    at = len(shape) + axis
    return prod(shape[:at]), shape[at], prod(shape[at + 1 :])


def as_rows(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """Rows, each the weights of one output; the weights of one, and how far each is from its next.

    axis: the input, of `input_axes`.
    """
    if len(shape) == 2 and axis == -2:
        return shape[1], shape[0], shape[1]
    return (1, prod(shape), 1) if len(shape) < 2 else (shape[0], prod(shape[1:]), 1)


def in_layers(patterns: Sequence[str | None]) -> str:
    """Patterns of layers in words: "3:4 in 9, 2:4 in 30 of 48 layers"; "" where none has any."""
    found = Counter(sorted(filter(None, patterns))).most_common()
    told = ", ".join(f"{nm} in {count}" for nm, count in found)
    return f"{told} of {len(patterns)} layers" if told else ""


CERTAIN = 40  # groups that hold more than N, were it not for a pattern


def pattern_of(most: Sequence[int], nonzero: int, weights: int) -> str | None:
    """The N:M that a layer has: "2:4"; None where it has none but by chance.

    most: of m = 0 … 16, the most nonzero weights in a group of m. nonzero, weights: of the layer.
    Many a sparse layer has a group of 16 that none fills: a pattern counts where, were the zeros
    strewn at random, at least 40 groups would be expected to hold more than N. That none does is
    then by chance with less than exp(-40) = 4e-18, below 1e-9 for all patterns of any model's layers
    together. Of several the one with the least share is named, then the one of the smallest M.
    """
    density = nonzero / weights if weights else 0.0
    found = []
    for m in range(2, LARGEST + 1):
        n = most[m]
        more = sum(comb(m, k) * density**k * (1 - density) ** (m - k) for k in range(n + 1, m + 1))
        if 0 < n < m and weights / m * more >= CERTAIN:
            found.append((n / m, m, n))
    return "{2}:{1}".format(*min(found)) if found else None


STATES = 1 << 16  # totals that are followed


def round_kept(kept: Sequence[int], sizes: Sequence[int], m: int) -> list[int]:
    """The N of each layer of one scope, whose layers keep `kept` of `sizes` weights in all.

    A layer's share of `m` is rounded down or up. Of all ways, the one whose total is nearest to the
    scope's; of several, the one with the least sum of weights that layers keep more or less than they
    should; then the one that rounds up the layers that come first. (Beyond 65,536 different totals
    those with the least sum are followed; networks have far fewer.)
    """
    counts = [k * m // size if size else m for k, size in zip(kept, sizes, strict=True)]
    rest = [k * m - n * size for k, n, size in zip(kept, counts, sizes, strict=True)]  # times m
    count = len(kept)
    # What is kept more than if all were rounded down -> (sum of errors, minus the layers as bits).
    states: dict[int, tuple[int, int]] = {0: (sum(rest), 0)}
    for size in dict.fromkeys(sizes):
        alike = sorted((-rest[i], i) for i in range(count) if sizes[i] == size and rest[i])
        more, ways = (0, 0), [(0, 0)]  # of layers of one size those with the largest rests go up
        for negative, i in alike:
            more = more[0] + size + 2 * negative, more[1] - (1 << (count - 1 - i))
            ways.append(more)
        after: dict[int, tuple[int, int]] = {}
        for total, (error, bits) in states.items():
            for up, (change, layers) in enumerate(ways):
                found = error + change, bits + layers
                key = total + up * size
                if key not in after or found < after[key]:
                    after[key] = found
        if len(after) > STATES:
            after = dict(sorted(after.items(), key=lambda item: item[1])[:STATES])
        states = after
    wanted = sum(rest)
    best = min(states, key=lambda total: (abs(total - wanted), states[total]))
    bits = -states[best][1]
    return [n + (bits >> (count - 1 - i) & 1) for i, n in enumerate(counts)]
