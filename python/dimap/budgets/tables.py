"""What surveys of the weights tell: how many of them each layer keeps, for any sparsity."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

from .. import _C
from ..groups.plan import Plan
from .costs import Cost, Parts

ROUNDS = 16  # surveys, far more than any weights need
TABLE_BYTES = 64 << 20  # all tables of a survey, about
# A first survey looks at magnitudes from 2^-24 to 2^8, as keys: the bits of the float32.
USUAL = (0x33800000, 0x437FFFFF)
ALL = (0, 0x7F7FFFFF)

# survey(tensor -> row, windows of the rows, bins) -> the rows, int64 (see `dimap.ops.survey`).
Survey: TypeAlias = "Callable[[Mapping[int, int], bytes, int], Any]"


@dataclass
class Weights:
    """What can be surveyed.

    zero_bits: of each tensor, the low zero bits of its keys: 0, 16 or 13. dense: whether a kept zero
        counts as another weight, since what is surveyed is not the weights.
    """

    plan: Plan
    zero_bits: Sequence[int]
    survey: Survey
    dense: bool = False


class Tables:
    """What surveys tell of the layers of a plan.

    sizes: how many weights each part has.
    costs: each of their parts is counted apart. limits: layer name -> weights that it keeps at least and
    at most. around: the magnitudes of the first survey, `USUAL` or `ALL`.
    """

    def __init__(
        self,
        weights: Weights,
        costs: Sequence[Cost] = (),
        limits: Mapping[str, tuple[int, int]] | None = None,
        around: tuple[int, int] = USUAL,
        bins: int = 4096,
    ) -> None:
        plan, self.weights = weights.plan, weights
        apart = [cost.part for cost in costs if cost.part]
        keys = [
            (layer.name, *(part(i) for part in apart))
            for i, (_, layer) in enumerate(plan.layer_of_tensors())
        ]
        begins = [key != before for before, key in pairwise([None, *keys])]
        self.part_of = [number - 1 for number in accumulate(begins)]  # of each tensor
        self.heads = [i for i, begin in enumerate(begins) if begin]  # of each part, a tensor
        self.names = list(dict.fromkeys(str(key[0]) for key in keys))  # of each set: its layer
        numbers = {name: number for number, name in enumerate(self.names)}
        self.set_of = [numbers[str(key[0])] for key in keys]  # of each tensor
        self.sizes, sizes = [0] * len(self.heads), [0] * len(self.names)
        for part, number, size in zip(self.part_of, self.set_of, plan.sizes, strict=True):
            self.sizes[part] += size
            sizes[number] += size
        layers = max(plan.layers) + 1
        modules, bits = [0] * layers, [16] * layers
        for number, scope, zero in zip(plan.layers, plan.scopes, weights.zero_bits, strict=True):
            modules[number], bits[number] = scope, min(bits[number], zero)
        layer_of = dict(zip(self.set_of, plan.layers, strict=True))
        most = limits or {name: (0, n) for name, n in zip(self.names, sizes, strict=True)}
        self.bins = max(256, min(bins, TABLE_BYTES // 24 // len(self.heads)))
        self._counts = _C.Counts(
            [(self.set_of[head], n) for head, n in zip(self.heads, self.sizes, strict=True)],
            [(layer_of[i], *most[name]) for i, name in enumerate(self.names)],
            modules,
            bits,
            bins=self.bins,
            first=around[0],
            last=around[1],
        )
        self._look()

    def _look(self) -> None:
        numbers, windows = self._counts.windows()
        rows = {part: row for row, part in enumerate(numbers)}
        tensors = {i: rows[part] for i, part in enumerate(self.part_of) if part in rows}
        self._counts.take(self.weights.survey(tensors, windows, self.bins))

    def close_in(self, least: Sequence[int], most: Sequence[int]) -> bool:
        """Survey what the keeps between the two need. False where nothing more can be known."""
        closer = self._counts.close_in(least, most)
        if closer:
            self._look()
        return closer

    def parts(self, keep: Sequence[int], end: int) -> Parts:
        """What the parts keep at least (end 0) or at most (1)."""
        _, kept, nonzero, _ = self._counts.kept(keep)
        others = kept if self.weights.dense else nonzero
        return [
            (head, count[end], other[end])
            for head, count, other in zip(self.heads, kept, others, strict=True)
        ]

    def settle(self, keep: Sequence[int]) -> tuple[list[int], list[float]]:
        """Exactly what each layer keeps, and the thresholds of the scopes."""
        for _ in range(ROUNDS):
            layers, _, _, thresholds = self._counts.kept(keep)
            if all(least == most for least, most in layers):
                return [least for least, _ in layers], thresholds
            if not self.close_in(keep, keep):
                break
        raise RuntimeError("the weights must not change while they are surveyed")

    def removed(self, keep: Sequence[int]) -> list[tuple[int, float]]:
        """Of each part, how many weights are dropped and the sum of their squares, about."""
        _, kept, _, _ = self._counts.kept(keep)
        scopes = [self.weights.plan.scopes[head] for head in self.heads]
        sums = [[0, 0] for _ in keep]
        for scope, pair in zip(scopes, kept, strict=True):
            sums[scope] = [a + b for a, b in zip(sums[scope], pair, strict=True)]
        found = []
        for part, (scope, (least, most)) in enumerate(zip(scopes, kept, strict=True)):
            # Between the bounds as all parts of the scope together are.
            low, high = sums[scope]
            share = (keep[scope] - low) / (high - low) if high > low else 0.0
            dropped = self.sizes[part] - least - round(share * (most - least))
            found.append((dropped, self.removed_from(part, dropped)))
        return found

    def removed_from(self, part: int, dropped: int) -> float:
        """The sum of the squares of so many of the smallest weights of a part, about."""
        counts, energies = self._curves[part]
        i = bisect_left(counts, dropped, 1)
        share = (dropped - counts[i - 1]) / max(counts[i] - counts[i - 1], 1)
        return energies[i - 1] + share * (energies[i] - energies[i - 1])

    def energies(self) -> list[float]:
        """The sum of the squares of each part, about."""
        return [energies[-1] for _, energies in self._curves]

    @cached_property
    def _curves(self) -> list[tuple[list[int], list[float]]]:
        """Of each part, from the smallest weights up: how many, and the sum of their squares."""
        curves = []
        for part in range(len(self.heads)):
            curve = self._counts.curve(part) or [(0, 0.0)]
            counts = [0, *accumulate(n for n, _ in curve)]
            curves.append((counts, [0.0, *accumulate(n * square for n, square in curve)]))
        return curves
