"""Where `dimap prune --report` writes: a JSON file, or a folder with pictures and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .._files import replacing
from ..checkpoint import Checkpoint
from ..checkpoint.folder import Shards
from ..groups import Layer
from . import Report


class ReportOutput(Protocol):
    """Takes what the report needs: dense weights before they are pruned, then the counts."""

    def before(self, checkpoint: Checkpoint) -> None: ...
    def write(self, report: Report, pruning: Any) -> None: ...


@contextmanager
def report_output(
    path: Path, modules: Mapping[str, list[Layer]], *, force: bool
) -> Iterator[ReportOutput]:
    """A JSON file where `path` ends in .json or is a file already, else a folder; whole at the end."""
    if (path.suffix == ".json" or path.is_file()) and not path.is_dir():
        with replacing(path, force=force) as temporary:
            yield _File(temporary)
    else:
        from ..plots._folder import report_folder

        with report_folder(path, modules, force=force) as place_of:
            yield _Folder(place_of, modules)


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path

    def before(self, checkpoint: Checkpoint) -> None:
        pass

    def write(self, report: Report, pruning: Any) -> None:
        report.to_json(self._path)


class _Folder:
    def __init__(self, place_of: Any, modules: Mapping[str, list[Layer]]) -> None:
        self._place_of, self._modules = place_of, modules

    def before(self, checkpoint: Checkpoint) -> None:
        from ..plots._folder import drawn_parameters

        self._tensors = checkpoint.tensors
        self._weight: Callable[[str], Tensor] = checkpoint.get
        if not isinstance(checkpoint, Shards):  # it is pruned in place: keep what will be drawn
            names = drawn_parameters(self._modules)
            self._weight = {name: checkpoint.get(name).clone() for name in names}.__getitem__

    def write(self, report: Report, pruning: Any) -> None:
        from ..plots._folder import fill
        from ..plots._source import Source

        def mask(name: str) -> Tensor:
            if hasattr(pruning, "masks"):
                found: Tensor = pruning.masks[name]
                return found
            return kept_mask(self._weight(name), pruning.kept[name])

        fill(
            self._place_of,
            report,
            Source.of(self._modules, self._tensors, self._weight, mask),
        )


def kept_mask(weight: Tensor, kept: int) -> Tensor:
    """The mask of a tensor of which the `kept` largest magnitudes stay; ties go to the earlier.

    Within a tensor every scope and normalization orders by magnitude, so that the count is enough.
    """
    magnitude = weight.detach().abs().flatten()
    if kept == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    cut = magnitude.float().kthvalue(magnitude.numel() - kept + 1).values.to(magnitude.dtype)
    mask = magnitude > cut
    ties = (magnitude == cut).nonzero().flatten()
    mask[ties[: kept - int(mask.count_nonzero())]] = True
    return mask.view(weight.shape)
