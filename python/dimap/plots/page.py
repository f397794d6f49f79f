"""A report as one HTML page: tables and pictures, nothing loaded from anywhere."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from ..groups import position
from ..report import Report
from ..report.report import MODULES, module_rows
from ..report.text import short, tiny
from . import style
from .source import place_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --back: #ffffff; --line: #d1d9e0; --soft: #59636e;
        --bar: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --back: #0d1117; --line: #3d444d; --soft: #9198a1; --bar: #56b4e9; } }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
       background: var(--back); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
th.name, td.name { text-align: left; }
tr.first td { border-top: 1px solid var(--line); }
tr.total td { border-top: 1px solid var(--line); font-weight: 600; }
td.bar { min-width: 7rem; }
td.bar div { height: .65rem; background: var(--bar); border-radius: 2px; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figure img { max-width: 100%; height: auto; }
figure img { background: #ffffff; border-radius: 6px; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
""".strip()


def page(report: Report, pictures: Sequence[tuple[str, str, str]]) -> str:
    """The HTML text. pictures: (heading, caption, `inline_svg` or `inline_png`) of each."""
    title = f"Pruning report{': ' + report.model if report.model else ''}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in _summary(report)),
        *(f'<p class="soft">{escape(note)}</p>' for note in report.notes),
        "<h2>Modules</h2>",
        _modules(report),
    ]
    for heading, caption, picture in pictures:
        parts.append(f"<h2>{escape(heading)}</h2>") if heading else None
        caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        parts.append(f"<figure>{picture}{caption}</figure>")
    parts += ["<h2>Layers</h2>", _layers(report), "</body>", "</html>", ""]
    return "\n".join(parts)


def inline_svg(figure: Figure, number: int, alt: str) -> str:
    """An <svg> element in the page's own font and ink; `number` keeps its ids apart from others."""
    buffer = io.BytesIO()
    style.write(figure, buffer, ".svg", inline=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg ") :].strip()
    text = re.sub(r'\bid="', f'id="p{number}-', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)(?=\w)', rf"\g<1>p{number}-", text)
    text = text.replace(style.INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)


def inline_png(data: bytes, alt: str) -> str:
    """An <img> element that holds the bytes of a PNG."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{b64encode(data).decode()}">'


def _summary(report: Report) -> list[str]:
    ratios = ", ".join(f"{name} {100 * ratio:g} %" for name, ratio in report.sparsity.items())
    lines = [
        f"Asked for: {ratios}; scope {report.scope}, normalize {report.normalize}.",
        f"{report.kept:,} of {report.weights:,} parameters are kept: "
        f"{report.removed_percent:.2f} % are removed.",
    ]
    if report.flops is not None and report.flops_removed_percent is not None:
        size = " × ".join(map(str, report.input_size or ()))
        lines.append(
            f"{short(report.flops)} of {short(report.flops_dense)} multiply-adds of one {size} "
            f"input are left: {report.flops_removed_percent:.2f} % are removed, nominally "
            f"{report.flops_nominal_removed_percent:.2f} %."
        )
    return lines


def _modules(report: Report) -> str:
    rows = module_rows(report, count=lambda n: f"{n:,}", digits=2)
    used = [i for i in range(len(MODULES)) if any(row[i] for row in rows)]
    head, *lines = (_row([row[i] for i in used]) for row in [MODULES, *rows])
    lines[-1] = lines[-1].replace("<tr>", '<tr class="total">')
    return _table("modules", head, lines)


def _layers(report: Report) -> str:
    flops = any(layer.flops for layer in report.layers)
    head = ["layer", "module", "weights", "kept", "density", "", "min |w|"] + ["FLOPs"] * flops
    lines = []
    for _, members in groupby(sorted(report.layers, key=position), key=position):
        first = ' class="first"'
        for layer in members:
            density = f"{100 * layer.density:.1f}"
            cells = [
                layer.name, layer.module, f"{layer.weights:,}", f"{layer.kept:,}", f"{density} %",
                "", tiny(layer.smallest_kept), *[short(layer.flops)] * flops,
            ]  # fmt: skip
            bar = f'<td class="bar"><div style="width: {density}%"></div></td>'
            row = _row(cells).replace("<td></td>", bar, 1)
            place = f' title="{escape(place_name(layer))}"'
            lines.append(row.replace("<tr>", f"<tr{first}{place}>"))
            first = ""
    return _table("layers", _row(head), lines)


def _row(cells: Sequence[str]) -> str:
    """A row of cells, the first of which is a name."""
    name, *others = map(escape, cells)
    others = [f"<td>{cell}</td>" for cell in others]
    return f'<tr><td class="name">{name}</td>{"".join(others)}</tr>'


def _table(name: str, head: str, lines: Sequence[str]) -> str:
    head = head.replace("<td", "<th").replace("</td", "</th")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table id="{name}">\n<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
