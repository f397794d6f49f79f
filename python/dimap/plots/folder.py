"""A report as a folder: report.json, the pictures, and a page with tables that holds them too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from itertools import groupby, islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .._files import replacing
from ..groups import Layer, position
from ..report import LayerReport, ModuleReport, Pruned, Report
from ..report.report import (
    count_columns,
    density_columns,
    module_columns,
    note_lines,
    summary_lines,
)
from ..report.text import Column, filled, short
from . import style
from .histograms import block_of, choose_blocks, weight_histograms
from .kept import kept_ratios
from .mask import mask_picture
from .source import Source, place_name, prunable, source_of, spread

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure
    from torch import Tensor

    from ..checkpoint import Checkpoint

MASKS = 3  # how many layers' masks are drawn
PathOf = Callable[[str], Path]  # from a file's name to where it is to be written
# What the page has in its reader's light or dark colours.
THEME = {
    style.INK: "currentColor", style.PAPER: "var(--back)", style.FAINT: "var(--faint)",
    style.BLUE: "var(--blue)",
}  # fmt: skip


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
    with _report_folder(Path(path), prunable(pruning.modules), force=force) as path_of:
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
        layers = prunable(modules)
        with _report_folder(path, layers, force=force) as path_of:
            yield ReportOutput(path_of, layers)


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
            names = {
                p for layer in [*drawn, *_masked(self._layers).values()] for p in layer.parameters
            }
            self._dense.weight = {n: checkpoint.get(n).clone() for n in names}.__getitem__

    def write(self, report: Report, pruning: Pruned) -> None:
        """Write all files."""
        if self._layers is None:
            report.to_json(self._path_of("report.json"))
            return
        weight = self._dense.weight

        def mask(name: str) -> Tensor:
            return kept_mask(weight(name), pruning.kept[name])

        held = getattr(pruning, "masks", None)  # of what was pruned in memory
        source = Source(
            self._layers, weight, held.__getitem__ if held else mask, self._dense.family
        )
        _fill(self._path_of, report, source)


def kept_mask(weight: Tensor, kept: int) -> Tensor:
    """The mask of a tensor of which the `kept` largest magnitudes stay; ties go to the earlier.

    Within a tensor every scope and normalization orders by magnitude, so that the count is enough.
    """
    from ..ops import select

    return select([weight], [0], [0], [kept])[0]


@contextmanager
def _report_folder(path: Path, layers: Sequence[Layer], *, force: bool) -> Iterator[PathOf]:
    """All files appear when the block ends: in a new folder, or in the one that is there."""
    style.check_path(None)
    with ExitStack() as outputs:
        if not path.is_dir():
            folder = outputs.enter_context(replacing(path, folder=True))
            yield lambda name: folder / name
        else:
            pictures = ["kept", "weights", *_masked(layers)]
            names = ["report.json", "index.html", *(f"{name}.png" for name in pictures)]
            files = {n: outputs.enter_context(replacing(path / n, force=force)) for n in names}
            yield files.__getitem__


def _fill(path_of: PathOf, report: Report, source: Source) -> None:
    """Draw the pictures and write all files."""
    path_of("report.json").write_text(report.to_json(), encoding="utf-8")
    figures = {"kept": kept_ratios(report), "weights": weight_histograms(source)}
    for name, layer in _masked(source.layers).items():
        figures[name] = mask_picture(source, layer.name)
    for name, figure in figures.items():
        style.write(figure, path_of(f"{name}.png"), ".png")
    path_of("index.html").write_text(_page(report, figures), encoding="utf-8")


def _masked(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Layers whose masks are drawn: of qkv, or of the first module, one early, in between, late.

    Under the names of their pictures.
    """
    first = next((x.module for x in layers if x.module == "qkv"), layers[0].module)
    chosen = spread([layer for layer in layers if layer.module == first], MASKS)
    return {f"mask-{number}": layer for number, layer in enumerate(chosen, 1)}


# The page


def _page(report: Report, figures: Mapping[str, Figure]) -> str:
    summary = [f"<p>{escape(line.replace('->', '→'))}</p>" for line in summary_lines(report)]
    summary += [f'<p class="soft">{escape(line)}</p>' for line in note_lines(report)]
    kept, weights, *masks = (_inline_svg(name, figure) for name, figure in figures.items())
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"Pruning report{': ' + report.model if report.model else ''}"),
        summary="\n".join(summary),
        kept=kept,
        weights=weights,
        masks="\n".join(f"<figure>{mask}</figure>" for mask in masks),
        **_tables(report),
    )


def _inline_svg(name: str, figure: Figure) -> str:
    """An <svg> element in the page's own font and colours; `name` keeps its ids apart from others."""
    buffer = io.BytesIO()
    style.write(figure, buffer, ".svg", inline=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg ") :].strip()
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)(?=\w)', rf"\g<1>{name}-", text)
    for color, themed in THEME.items():
        text = text.replace(color.lower(), themed)
    wide = round(figure.get_figwidth() * style.DPI)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" style="width: {wide}px" ', 1)


def _tables(report: Report) -> dict[str, str]:
    """Of modules, and of layers block after block; both with what is in no module, and the sum."""
    parts = report.parts()
    modules = _table("modules", module_columns("{:,}".format, digits=2), [parts[:-1], parts[-1:]])
    columns = [
        Column("layer", lambda part: part.name),
        Column("module", lambda part: getattr(part, "module", "")),
        *count_columns("{:,}".format),
        *density_columns(),
        Column("FLOPs", lambda part: short(part.flops)),
    ]
    blocks = groupby(sorted(report.layers, key=position), key=position)
    beside = parts[len(report.modules) - 1 :]  # from "aux" on
    layers = _table("layers", columns, [*(list(block) for _, block in blocks), beside])
    return {"modules": modules, "layers": layers}


def _table(
    name: str, columns: Sequence[Column], groups: Sequence[Sequence[LayerReport | ModuleReport]]
) -> str:
    """A table with a body for each group of rows, without the columns that say nothing."""
    used, lines = filled(columns, [row for group in groups for row in group])
    left = iter(lines)
    head = "".join(f"<th>{escape(column.title)}</th>" for column in used)
    bodies = []
    for group in groups:
        place = place_name(group[0]) if isinstance(group[0], LayerReport) else ""
        rows = ["<tr>" + "".join(map(_cell, line)) + "</tr>" for line in islice(left, len(group))]
        bodies.append("\n".join([f'<tbody title="{place}">', *rows, "</tbody>"]))
    table = f'<table id="{name}">\n<thead><tr>{head}</tr></thead>\n' + "\n".join(bodies)
    return f'<div class="wide">{table}\n</table></div>'


def _cell(cell: str | float) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    return f'<td class="bar"><div style="width: {100 * cell:.1f}%"></div></td>'
