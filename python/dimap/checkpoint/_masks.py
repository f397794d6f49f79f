"""Where the bits of each mask lie in a file of masks (the format is described in `dimap.masks`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from ._stream_types import StreamPruning


def lay_out_masks(names: Sequence[str], result: StreamPruning) -> tuple[dict[str, int], bytes, int]:
    """The place of each tensor's bits in a mask file, the file's header and length."""
    settings: dict[str, str] = {"scope": result.scope, "normalize": result.normalize}
    settings |= {f"sparsity.{name}": repr(s) for name, s in result.sparsity.items()}
    shapes = {name: list(result.shapes[name]) for name in names}
    settings |= {"dimap_masks": "1", "shapes": json.dumps(shapes)}
    header: dict[str, object] = {"__metadata__": settings}
    places, at = {}, 0
    for name in names:
        size = (math.prod(shapes[name]) + 7) // 8
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        places[name] = at
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return {name: len(raw) + place for name, place in places.items()}, raw, len(raw) + at
