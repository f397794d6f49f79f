"""A report as a folder: report.json, index.html, and the pictures that are in the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import replacing
from ..groups import Layer, part_of
from ..report import Pruned, Report
from . import style
from .histograms import block_of, choose_blocks, weight_histograms
from .kept import kept_ratios
from .mask import mask_picture
from .page import page
from .source import Source, prunable, source_of

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from ..checkpoint import Checkpoint

MASKS = 3  # how many layers' masks are drawn
PathOf = Callable[[str], Path]  # from a file's name to where it is to be written


def write_report(
    pruning: Any, path: str | os.PathLike[str], model: Any = None, *, force: bool = False
) -> Report:
    """Write report.json, index.html and pictures of a `dimap.Pruning` into the folder `path`.

    path: created if need be; a folder that is there keeps its other files.
    model: the nn.Module, to count its FLOPs.
    force: replace files of these names; else they are a FileExistsError.

    The page needs no other file and loads nothing. Files appear complete or not at all. Raises
    ModuleNotFoundError without matplotlib, OSError where the folder cannot be written.
    """
    with _report_folder(Path(path), pruning.modules, force=force) as path_of:
        report: Report = pruning.report(model)
        _fill(path_of, report, source_of(pruning))
    return report


@contextmanager
def report_output(
    path: Path, modules: Mapping[str, Sequence[Layer]], *, force: bool = False
) -> Iterator[ReportOutput]:
    """Where the report of a checkpoint's pruning goes: complete when the block ends, or not there.

    path: a JSON file where it ends in .json or is a file already, else a folder as of `write_report`.
    modules: the layers that will be pruned. Raises as `write_report`; for a JSON file there need not
    be matplotlib.
    """
    if (path.suffix == ".json" or path.is_file()) and not path.is_dir():
        with replacing(path, force=force) as temporary:
            yield ReportOutput(lambda _: temporary, None)
    else:
        with _report_folder(path, modules, force=force) as path_of:
            yield ReportOutput(path_of, prunable(modules))


class ReportOutput:
    """Takes what a report needs of a pruning in memory, or from file to file.

    path_of: from a file's name to where it is to be written.
    layers: those to draw, block after block; None draws nothing.
    """

    def __init__(self, path_of: PathOf, layers: list[Layer] | None) -> None:
        self._path_of, self._layers = path_of, layers

    def before(self, checkpoint: Checkpoint) -> None:
        """Look at the dense weights before they are pruned."""
        if self._layers is None:
            return
        self._dense = source_of(checkpoint)
        if checkpoint.form not in ("safetensors", "folder"):  # pruned in place: keep what is drawn
            blocks = choose_blocks(self._layers)
            drawn = [layer for layer in self._layers if block_of(layer) in blocks]
            names = {p for layer in [*drawn, *_masked(self._layers)] for p in layer.parameters}
            weight = self._dense.weight
            self._dense.weight = {n: weight(n).clone() for n in names}.__getitem__

    def write(self, report: Report, pruning: Pruned) -> None:
        """Write all files."""
        if self._layers is None:
            report.to_json(self._path_of("report.json"))
            return
        masks = getattr(pruning, "masks", None)  # of what was pruned in memory
        weight = self._dense.weight

        def mask(name: str) -> Tensor:
            if masks:
                found: Tensor = part_of(masks, name)
                return found
            return kept_mask(weight(name), pruning.kept[name])

        _fill(self._path_of, report, Source(self._layers, weight, mask, self._dense.family))


def kept_mask(weight: Tensor, kept: int) -> Tensor:
    """The mask of a tensor of which the `kept` largest magnitudes stay; ties go to the earlier.

    Within a tensor every scope and normalization orders by magnitude, so that the count is enough.
    """
    magnitude = weight.detach().abs().flatten()
    if kept == 0:
        return magnitude.bool().zero_().view(weight.shape)
    cut = magnitude.float().kthvalue(magnitude.numel() - kept + 1).values.to(magnitude.dtype)
    mask = magnitude > cut
    ties = (magnitude == cut).nonzero().flatten()
    mask[ties[: kept - int(mask.count_nonzero())]] = True
    return mask.view(weight.shape)


@contextmanager
def _report_folder(
    path: Path, modules: Mapping[str, Sequence[Layer]], *, force: bool
) -> Iterator[PathOf]:
    """All files appear when the block ends: in a new folder, or in the one that is there."""
    style.check_path(None)
    with ExitStack() as outputs:
        if not path.is_dir():
            folder = outputs.enter_context(replacing(path, folder=True))
            yield lambda name: folder / name
        else:
            names = ["report.json", "index.html", "kept.png", "weights.png"]
            names += [_mask_file(number) for number in range(len(_masked(prunable(modules))))]
            files = {n: outputs.enter_context(replacing(path / n, force=force)) for n in names}
            yield files.__getitem__


def _fill(path_of: PathOf, report: Report, source: Source) -> None:
    """Draw the pictures and write all files."""
    path_of("report.json").write_text(report.to_json(), encoding="utf-8")
    kept, weights = kept_ratios(report), weight_histograms(source)
    style.write(kept, path_of("kept.png"), ".png")
    style.write(weights, path_of("weights.png"), ".png")
    masks = {}
    for number, layer in enumerate(_masked(source.layers)):
        picture = io.BytesIO()
        style.write(mask_picture(source, layer.name), picture, ".png")
        masks[layer.name] = picture.getvalue()
        path_of(_mask_file(number)).write_bytes(masks[layer.name])
    path_of("index.html").write_text(page(report, kept, weights, masks), encoding="utf-8")


def _masked(layers: Sequence[Layer]) -> list[Layer]:
    """Layers whose masks are drawn: of qkv, or of the first module, one early, in between, late."""
    first = next((x.module for x in layers if x.module == "qkv"), layers[0].module)
    layers = [layer for layer in layers if layer.module == first]
    steps = range(MASKS)
    return [layers[i] for i in sorted({round(k * (len(layers) - 1) / (MASKS - 1)) for k in steps})]


def _mask_file(number: int) -> str:
    return f"mask-{number + 1}.png"
