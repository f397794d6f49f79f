"""A report as one HTML page: tables and pictures, nothing loaded from anywhere."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ..groups import position
from ..report import Report
from ..report.report import MODULES, module_rows, note_lines, summary_lines
from ..report.text import short, tiny
from . import style
from .source import place_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(report: Report, kept: Figure, weights: Figure, masks: Mapping[str, bytes]) -> str:
    """The HTML text. masks: name of a layer -> the PNG of its mask."""
    images = (
        f'<figure><img alt="mask of {escape(name)}" '
        f'src="data:image/png;base64,{b64encode(png).decode()}"></figure>'
        for name, png in masks.items()
    )
    summary = [f"<p>{escape(line.replace('->', '→'))}</p>" for line in summary_lines(report)]
    summary += [f'<p class="soft">{escape(line)}</p>' for line in note_lines(report)]
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"Pruning report{': ' + report.model if report.model else ''}"),
        summary="\n".join(summary),
        modules=_modules(report),
        kept=_inline_svg(kept, 0, "kept share of every layer"),
        weights=_inline_svg(weights, 1, "histograms of weights"),
        masks="\n".join(images),
        layers=_layers(report),
    )


def _inline_svg(figure: Figure, number: int, alt: str) -> str:
    """An <svg> element in the page's own font and ink; `number` keeps its ids apart from others."""
    buffer = io.BytesIO()
    style.write(figure, buffer, ".svg", inline=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg ") :].strip()
    text = re.sub(r'\bid="', f'id="p{number}-', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)(?=\w)', rf"\g<1>p{number}-", text)
    text = text.replace(style.INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)


def _modules(report: Report) -> str:
    rows = module_rows(report, count=lambda n: f"{n:,}", digits=2)
    used = [i for i in range(len(MODULES)) if any(row[i] for row in rows)]
    *lines, total = ([row[i] for i in used] for row in rows)
    body = [*map(_row, lines), _row(total, 'class="total"')]
    return _table("modules", [MODULES[i] for i in used], body)


def _layers(report: Report) -> str:
    flops = any(layer.flops for layer in report.layers)
    head = ["layer", "module", "weights", "kept", "density", "", "min |w|"] + ["FLOPs"] * flops
    lines = []
    for _, members in groupby(sorted(report.layers, key=position), key=position):
        for number, layer in enumerate(members):
            density = f"{100 * layer.density:.1f}"
            cells = [
                layer.name, layer.module, f"{layer.weights:,}", f"{layer.kept:,}", f"{density} %",
                "", tiny(layer.smallest_kept), *[short(layer.flops)] * flops,
            ]  # fmt: skip
            bar = f'<td class="bar"><div style="width: {density}%"></div></td>'
            first = "" if number else 'class="first" '
            row = _row(cells, f'{first}title="{escape(place_name(layer))}"')
            lines.append(row.replace("<td></td>", bar, 1))
    return _table("layers", head, lines)


def _row(cells: Sequence[str], attributes: str = "", tag: str = "td") -> str:
    """A row of cells, the first of which is a name."""
    name, *others = map(escape, cells)
    rest = "".join(f"<{tag}>{cell}</{tag}>" for cell in others)
    return f'<tr {attributes}><{tag} class="name">{name}</{tag}>{rest}</tr>'.replace(" >", ">", 1)


def _table(name: str, head: Sequence[str], lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table id="{name}">\n<thead>{_row(head, tag="th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
