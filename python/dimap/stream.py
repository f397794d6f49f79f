"""Prune a safetensors file, or a folder of them, without loading it: exactly, at the disk's speed.

Surveys add up, so a checkpoint is pruned as it streams by: read once to find the cuts, once more to
write the output. Memory does not grow with the checkpoint, nor with its largest tensor, and the
result is bit by bit that of `dimap.prune`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ._files import replacing
from .checkpoint import open_checkpoint
from .checkpoint._safetensors import Folder, Shards, ShardsWriter, write_packed_index
from .checkpoint._stream_job import Job
from .checkpoint._stream_types import Progress, Silent, StreamPruning
from .distributed.ranks import Ranks, group_of
from .groups import Patterns
from .groups._plan import Normalize
from .groups._scopes import Scope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Progress", "StreamPruning", "prune_checkpoint", "pruning_checkpoint"]


def prune_checkpoint(
    source: str | os.PathLike[str] | Shards,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
    masks: str | os.PathLike[str] | None = None,
    bitmask: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> StreamPruning:
    """Prune a safetensors file or a Hugging Face folder of them into another.

    source: the path, or an open checkpoint. It is only read.
    target: a file for a file, a folder for a folder. It appears complete or not at all: the same
        headers, metadata, index and other files, with weights set to zero.
    sparsity, scope, normalize, patterns: as in `dimap.select`.
    masks: a file for the masks (see `dimap.load_masks`), one bit a weight.
    bitmask: write files of one bit a weight and the nonzero values (docs/format.md), which
        `dimap.load_file` and `dimap expand` read.
    force: replace outputs that are there already.
    group: several processes do it together, each its part of the bytes: all of them call this with
        the same arguments and see the same files. The first one creates the outputs and returns
        when they are there, as do the others.

    Raises ValueError for a checkpoint that is damaged, of no known family, or holds weights that
    are not finite or not float32, bfloat16 or float16; OSError where files cannot be read or
    written; FileExistsError where an output exists and not `force`. With a group: RuntimeError for an
    error in another rank, with its message, and ConnectionError for a rank that is gone.
    """
    with ExitStack() as stack:
        ranks = Ranks() if group is None else stack.enter_context(group_of(group))
        pruned = stack.enter_context(
            pruning_checkpoint(
                source,
                target,
                sparsity,
                scope=scope,
                normalize=normalize,
                patterns=patterns,
                masks=masks,
                bitmask=bitmask,
                force=force,
                progress=progress,
                ranks=ranks,
            )
        )
    return pruned


@contextmanager
def pruning_checkpoint(
    source: str | os.PathLike[str] | Shards,
    target: str | os.PathLike[str],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "module",
    normalize: Normalize = "layer",
    patterns: Patterns | None = None,
    masks: str | os.PathLike[str] | None = None,
    bitmask: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Iterator[StreamPruning]:
    """`prune_checkpoint`, but the outputs appear when the block ends, and not if it fails.

    ranks: those that do it together, where there are several; they leave the block together.
    """
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        if isinstance(source, Shards):
            checkpoint = source
        else:
            found = stack.enter_context(open_checkpoint(source))
            if not isinstance(found, Shards):
                raise ValueError(f"a stream needs safetensors files, got {found.path}")
            checkpoint = found
        if checkpoint.packed:
            raise ValueError(
                f"{checkpoint.path} must be dense, got a bitmask file: `dimap expand` makes it dense"
            )
        told = progress if progress is not None and ranks.rank == 0 else Silent()
        job = Job(checkpoint, sparsity, scope, normalize, patterns, told, ranks)
        job.check_agreement(scope, normalize, job.result.sparsity, masks is None, bitmask)
        made: tuple[list[Path], Path | None] | None = None
        writer: ShardsWriter | None = None
        if ranks.rank == 0:
            packed = None
            if masks is not None:
                _check_apart(Path(masks), {"IN": Path(checkpoint.path), "OUT": Path(target)})
                packed = stack.enter_context(replacing(Path(masks), force=force))
            created = stack.enter_context(checkpoint.create(target, force=force))
            assert isinstance(created, ShardsWriter)
            writer = created
            made = [path.absolute() for path in writer.targets], packed and packed.absolute()
        ranks.outputs(*(Path(path) for path in (target, masks) if path is not None))
        stack.enter_context(ranks.stopping_together())  # inside of what removes the outputs
        made = ranks.gather(made)[0]
        assert made is not None
        pruned = job.run(*made, bitmask=bitmask)
        if writer is not None:
            if bitmask and isinstance(checkpoint, Folder) and checkpoint.index is not None:
                write_packed_index(next(iter(writer.targets)).parent)
            writer.filled()
        yield pruned
        ranks.gather(None)  # nothing is renamed before all ranks are here


def _check_apart(masks: Path, others: Mapping[str, Path]) -> None:
    place = masks.resolve()
    for name, other in others.items():
        if other.resolve() in (place, *place.parents):
            raise ValueError(f"masks must lie apart from {name}, got {masks}")
