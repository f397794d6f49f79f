"""A report as a folder: report.json, index.html, and the pictures that are in the page."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .._files import replacing
from ..groups import AUX, Layer
from ..report._types import Report
from . import _page, _style
from ._histograms import choose_blocks, spot_of, weight_histograms
from ._kept import kept_ratios
from ._mask import mask_picture
from ._source import Source, place, source_of

MASKS = 3  # how many layers' masks are drawn
Place = Callable[[str], Path]


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
    with report_folder(Path(path), pruning.modules, force=force) as place_of:
        report: Report = pruning.report(model)
        fill(place_of, report, source_of(pruning))
    return report


@contextmanager
def report_folder(
    path: Path, modules: Mapping[str, Sequence[Layer]], *, force: bool = False
) -> Iterator[Place]:
    """Yield a function from a file's name to where to write it; all appear when the block ends."""
    _style.check_path(None)
    with ExitStack() as outputs:
        if not path.is_dir():
            folder = outputs.enter_context(replacing(path, folder=True))
            yield lambda name: folder / name
        else:
            files = {
                name: outputs.enter_context(replacing(path / name, force=force))
                for name in file_names(modules)
            }
            yield files.__getitem__


def file_names(modules: Mapping[str, Sequence[Layer]]) -> list[str]:
    """What will be in the folder."""
    masks = range(len(_masked(modules)))
    return ["report.json", "index.html", "kept.png", "weights.png", *map(_mask_name, masks)]


def drawn_parameters(modules: Mapping[str, Sequence[Layer]]) -> list[str]:
    """The parameters whose weights the pictures of a folder show."""
    layers = _prunable(modules)
    spots = choose_blocks(layers)
    drawn = [layer for layer in layers if spot_of(layer) in spots] + _masked(modules)
    return list(dict.fromkeys(name for layer in drawn for name in layer.parameters))


def fill(place_of: Place, report: Report, source: Source) -> None:
    """Draw the pictures and write all files."""
    place_of("report.json").write_text(report.to_json(), encoding="utf-8")
    kept, weights = kept_ratios(report), weight_histograms(source)
    for name, figure in (("kept.png", kept), ("weights.png", weights)):
        _style.write(figure, place_of(name), "png")
    pictures = [
        (
            "What every layer keeps",
            "Share of the weights that each layer keeps, block after block.",
            _page.inline_svg(kept, 0, "kept share of every layer"),
        ),
        (
            "Weights",
            "Kept weights in colour, pruned ones in grey where they are known; every panel has "
            "its own height.",
            _page.inline_svg(weights, 1, "histograms of weights"),
        ),
    ]
    modules: dict[str, list[Layer]] = {}
    for layer in source.layers:
        modules.setdefault(layer.module, []).append(layer)
    for number, layer in enumerate(_masked(modules)):
        buffer = io.BytesIO()
        _style.write(mask_picture(source, layer.name), buffer, "png")
        place_of(_mask_name(number)).write_bytes(buffer.getvalue())
        heading = "" if number else "Masks"
        picture = _page.inline_png(buffer.getvalue(), f"mask of {layer.name}")
        pictures.append((heading, "", picture))
    place_of("index.html").write_text(_page.page(report, pictures), encoding="utf-8")


def _prunable(modules: Mapping[str, Sequence[Layer]]) -> list[Layer]:
    layers = [layer for name, found in modules.items() if name != AUX for layer in found]
    return sorted(layers, key=place)


def _masked(modules: Mapping[str, Sequence[Layer]]) -> list[Layer]:
    """Layers whose masks are drawn: of qkv, or of the first module, one early, in between, late."""
    layers = _prunable(modules)
    first = "qkv" if modules.get("qkv") else layers[0].module
    layers = [layer for layer in layers if layer.module == first]
    steps = range(MASKS)
    return [layers[i] for i in sorted({round(k * (len(layers) - 1) / (MASKS - 1)) for k in steps})]


def _mask_name(number: int) -> str:
    return f"mask-{number + 1}.png"
