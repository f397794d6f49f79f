"""A report as a folder: report.json, the pictures, and a page with tables that holds them too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from itertools import groupby, islice
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .._files import replacing
from ..groups import Layer, part_of, position
from ..report import LayerReport, ModuleReport, Pruned, Report
from ..report.report import LAYERS, MODULES, columns, note_lines, summary_lines
from ..report.text import Column, filled
from . import style
from .histograms import block_of, choose_blocks, weight_histograms
from .kept import kept_ratios
from .mask import mask_picture
from .source import place_name, prunable, source_of, spread

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure
    from torch import Tensor

MASKS = 3  # how many layers' masks are drawn
# What the page has in its reader's light or dark colours.
THEME = {
    style.INK: "currentColor", style.PAPER: "var(--back)", style.FAINT: "var(--faint)",
    style.BLUE: "var(--blue)",
}  # fmt: skip


def write_report(
    pruning: Any, path: str | os.PathLike[str], model: Any = None, *, force: bool = False
) -> Report:
    """Write report.json, index.html and pictures of a `dimap.Pruning` into the folder `path`.

    path: created if need be; a folder that is there keeps its other files. Where it ends in .json or
        is a file already, it gets the JSON alone.
    model: the nn.Module, to count its FLOPs.
    force: replace files of these names; else they are a FileExistsError.

    The page needs no other file and loads nothing. Files appear complete or not at all. Raises
    ModuleNotFoundError without matplotlib, OSError where the folder cannot be written.
    """
    with report_output(Path(path), pruning.modules, force=force) as output:
        report: Report = pruning.report(model)
        output.before(pruning)
        output.write(report, pruning)
    return report


@contextmanager
def report_output(
    path: Path, modules: Mapping[str, Sequence[Layer]], *, force: bool = False
) -> Iterator[ReportOutput]:
    """Where the report of a checkpoint's pruning goes: complete when the block ends, or not there.

    path, force: as in `write_report`, which says what is raised; for JSON there need not be matplotlib.
    modules: the layers that will be pruned.
    """
    with ExitStack() as outputs:
        layers = prunable(modules)
        if (
            re.fullmatch(r"\.[A-Za-z]{2,5}", path.suffix)
            and path.suffix != ".json"
            and not path.is_dir()
        ):
            raise ValueError(f"report must be a file that ends in .json, or a folder, got {path}")
        if (path.suffix == ".json" or path.is_file()) and not path.is_dir():
            temporary = outputs.enter_context(replacing(path, force=force))
            yield ReportOutput([], lambda _: temporary)
            return
        style.check_path(None)
        if path.is_dir():
            pictures = ["kept", "weights", *_masked(layers)]
            names = ["report.json", "index.html", *(f"{name}.png" for name in pictures)]
            files = {n: outputs.enter_context(replacing(path / n, force=force)) for n in names}
            yield ReportOutput(layers, files.__getitem__)
        else:
            yield ReportOutput(layers, outputs.enter_context(replacing(path, folder=True)).joinpath)


@dataclass
class ReportOutput:
    """Takes what a report needs of a pruning in memory, or from file to file.

    layers: those to draw, block after block; of none, there are no pictures.
    path_of: from a file's name to where it is to be written.
    """

    layers: list[Layer]
    path_of: Callable[[str], Path]

    def before(self, model: Any) -> None:
        """Look at the weights of an open checkpoint before they are pruned, or at a Pruning."""
        if not self.layers:
            return
        self._source = source_of(model)
        if getattr(model, "form", "") in ("pickled", "timm"):  # pruned in place: keep what is drawn
            blocks = choose_blocks(self.layers)
            drawn = [layer for layer in self.layers if block_of(layer) in blocks]
            names = {p for x in [*drawn, *_masked(self.layers).values()] for p in x.parameters}
            weight = self._source.weight
            self._source.weight = {n: weight(n).clone() for n in names}.__getitem__

    def write(self, report: Report, pruning: Pruned) -> None:
        """Write all files."""
        self.path_of("report.json").write_text(report.to_json(), encoding="utf-8")
        if not self.layers:
            return
        weight = self._source.weight
        held = getattr(pruning, "masks", None)  # of what was pruned in memory

        def mask(name: str) -> Tensor:
            if not held:
                return kept_mask(weight(name), pruning.kept[name])
            found: Tensor = part_of(held, name)
            return found

        self._source.mask = mask
        figures = {"kept": kept_ratios(report), "weights": weight_histograms(self._source)}
        figures["kept"].set_label("kept share of every layer")
        figures["weights"].set_label("histograms of weights")
        for name, layer in _masked(self.layers).items():
            figures[name] = mask_picture(self._source, layer.name)
            figures[name].set_label(f"mask of {layer.name}")
        for name, figure in figures.items():
            style.write(figure, self.path_of(f"{name}.png"), ".png")
        self.path_of("index.html").write_text(_page(report, figures), encoding="utf-8")


def kept_mask(weight: Tensor, kept: int) -> Tensor:
    """The mask of a tensor of which the `kept` largest magnitudes stay; ties go to the earlier.

    Within a tensor every scope and normalization orders by magnitude, so that the count is enough.
    """
    from ..ops import select

    return select([weight], [0], [0], [kept])[0]


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
    alt = f'role="img" aria-label="{escape(figure.get_label())}"'
    return text.replace("<svg ", f'<svg {alt} style="width: {wide}px" ', 1)


def _tables(report: Report) -> dict[str, str]:
    """Of modules, and of layers block after block; both with what is in no module, and the sum."""
    parts, names = report.parts(), Column("module", lambda part: part.name)
    heads = columns(names, MODULES, "{:,}".format, digits=2)
    modules = _table("modules", heads, [parts[:-1], parts[-1:]])
    heads = columns(
        Column("layer", names.say), ("module", "weights", "kept", *LAYERS[1:]), "{:,}".format
    )
    blocks = groupby(sorted(report.layers, key=position), key=position)
    beside = parts[len(report.modules) - 1 :]  # from "aux" on
    layers = _table("layers", heads, [*(list(block) for _, block in blocks), beside])
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
