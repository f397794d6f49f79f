"""What a survey notes of the weights inside its windows, so that they need not be read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ._stream_guess import NON_FINITE, Keys, keys_of

ASIDE = 32_000_000  # weights set aside at most: 128 MB


@dataclass
class Note:
    """Keys of one block inside its window: each by itself, or how many there are of each.

    window: its first key, and the one behind its last. above: how many weights lie above it.
    """

    keys: Keys
    counts: NDArray[np.int32] | None
    window: tuple[int, int]
    above: int

    def count(self, key: int) -> int:
        hit = self.keys == key
        return int(hit.sum() if self.counts is None else self.counts[hit].sum())

    def kept(self, keep_from: int) -> int | None:
        """How many keys there are from this one on, where the note tells."""
        first, end = self.window
        if not first <= keep_from <= end:
            return None
        hit = self.keys >= keep_from
        return self.above + int(hit.sum() if self.counts is None else self.counts[hit].sum())

    def smallest(self, least: int) -> int | None:
        above = self.keys[self.keys >= least]
        return int(above.min()) if above.size else None

    def floats(self) -> Tensor:
        """The magnitudes of the keys, float32."""
        return torch.from_numpy(self.keys.view(np.float32))


class Notes:
    """The notes of all layers, of a limited size. Callers that share it hold a lock to change it."""

    def __init__(self) -> None:
        self._layers: dict[int, dict[tuple[int, int], Note]] = {}
        self._aside = 0

    def have_room(self, keys: int) -> bool:
        return self._aside + keys <= ASIDE

    def add(self, layer: int, tensor: int, start: int, note: Note) -> None:
        """Note the block of a tensor that begins at weight `start`."""
        self._layers.setdefault(layer, {})[tensor, start] = note
        self._aside += note.keys.size

    def forget(self, layer: int) -> None:
        for note in self._layers.pop(layer, {}).values():
            self._aside -= note.keys.size

    def of(self, layer: int) -> Mapping[tuple[int, int], Note]:
        """The notes of a layer's blocks, by tensor and start."""
        return self._layers.get(layer, {})


def keys_inside(weights: Tensor, base: int, width: int, count: int) -> Keys:
    """The keys of a flat tensor in [base, base + width)."""
    if count == 0:
        return np.zeros(0, np.uint32)
    # Two masks, from the first key on and from the last: their difference is the window.
    cuts = torch.tensor([[base, -1], [min(base + width, NON_FINITE), -1]])
    quota = torch.zeros(2, dtype=torch.int64)
    (low, high), _ = ops.emit([weights, weights], [0, 1], [0, 1], cuts, quota)
    hit = np.not_equal(low.numpy(), high.numpy(), out=low.numpy())
    return keys_of(weights[torch.from_numpy(np.flatnonzero(hit))])
