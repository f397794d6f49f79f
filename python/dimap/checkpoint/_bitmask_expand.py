"""Bitmask files back into dense ones, by the engine in C++."""

from __future__ import annotations

import math
import os

from .. import _C
from ._bitmask_layout import size_of, unpacked
from ._safetensors import Shards, ShardsWriter
from ._stream_job import opened, told
from ._stream_types import Progress


def expand_checkpoint(
    checkpoint: Shards, target: str | os.PathLike[str], *, force: bool, progress: Progress
) -> None:
    """Write the dense file or folder that an open checkpoint stands for."""
    if not checkpoint.packed:
        raise ValueError(f"{checkpoint.path} must hold a bitmask file, got dense weights")
    # A folder may hold dense files too.
    layouts = [shard.layout or unpacked(shard.header) for shard in checkpoint.shards]
    paths = [shard.path for shard in checkpoint.shards]
    tensors, names, rest = [], [], []
    for file, layout in enumerate(layouts):
        for entry in layout.dense.entries:
            values, bits = layout.places[entry.name]
            if bits is None:
                rest.append((file, values.begin, values.end - values.begin, entry.begin))
                continue
            count, size = math.prod(entry.shape), entry.dtype.itemsize
            tensors.append(
                (file, values.begin, values.shape[0], bits.begin, count, size, entry.begin)
            )
            names.append(entry.name)
    with checkpoint.create(target, force=force) as writer, opened(paths, os.O_RDONLY) as files:
        assert isinstance(writer, ShardsWriter)
        with opened(list(writer.targets), os.O_RDWR) as outputs:
            for (descriptor, _), layout in zip(outputs, layouts, strict=True):
                os.ftruncate(descriptor, size_of(layout.dense))
                os.pwrite(descriptor, layout.dense.raw, 0)
            try:
                _C.expand(files, outputs, tensors, rest, progress=told(progress))
            except _C.BitsError as error:
                number, want, got = error.args
                where = f"{paths[tensors[number][0]]}: {names[number]}"
                if want < 0:
                    raise ValueError(
                        f"{where} must have zeros in the unused bits of its last byte, got ones"
                    ) from error
                raise ValueError(
                    f"{where} must have as many values as its bits say, {want}, got {got}, and not "
                    "change while it is read"
                ) from error
        writer.filled()
