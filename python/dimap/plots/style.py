"""How all pictures look: size, fonts, colours; and how they are written.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart with any colour vision; no
picture tells things apart by colour alone. Figures are made without pyplot: nothing global changes,
and no window or display is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, FAINT, GREY = "#262626", "#D9D9D9", "#8C8C8C"

MODULES = {"qkv": BLUE, "proj": ORANGE, "mlp": GREEN}
OTHERS = (VERMILLION, PURPLE, SKY, BLACK)  # for modules of a caller's own
FORMATS = (".png", ".svg")
DPI = 120  # 8 inches are 960 pixels: sharp in a README, which shows some 830
WIDTH = 8.0  # inches
TEXT = 9.0  # points


def module_color(module: str, modules: list[str]) -> str:
    """The colour of a module among all `modules` of a picture."""
    if module in MODULES:
        return MODULES[module]
    others = [name for name in modules if name not in MODULES]
    return OTHERS[others.index(module) % len(OTHERS)]


def new_figure(width: float, height: float, *, layout: str | None = "constrained") -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def dress(axes: Axes, *, grid: str | None = "y") -> None:
    """Quiet axes: no box, thin ticks, a faint grid behind the data along "x", "y" or "both"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(labelsize=TEXT - 1, colors=INK, width=0.8, length=3)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GREY, alpha=0.25, linewidth=0.6)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=INK, fontsize=TEXT)


def head(figure: Figure, title: str | None) -> None:
    """Words above all of a picture."""
    if title:
        figure.suptitle(plain(title), fontsize=TEXT + 1, color=INK)


def plain(text: str) -> str:
    """`text` as it stands: a pair of dollar signs would be taken for mathematics."""
    return text.replace("$", r"\$")


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Raise where a picture could not be written to `path`, before any work.

    ModuleNotFoundError without matplotlib, ValueError for an ending that is not .png or .svg.
    """
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"a picture's path must end in {' or '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need the package matplotlib: pip install 'dimap[plot]'", name="matplotlib"
        ) from error


def finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure where a path is given, complete or not at all; a file there is replaced."""
    if path is not None:
        with replacing(Path(path), force=True) as temporary:
            write(figure, temporary, Path(path).suffix.lower())
    return figure


def write(figure: Figure, target: Any, ending: str, *, inline: bool = False) -> None:
    """Write to a path or a binary file: the same bytes for the same figure and matplotlib.

    ending: ".png" or ".svg".
    inline: SVG for a page of either ink: no background, and words in the page's fonts, not shapes.
    """
    if ending == ".png":
        _write_png(figure, target)
        return
    import matplotlib

    options = {"svg.fonttype": "none" if inline else "path", "svg.hashsalt": "dimap"}
    undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(options):
        figure.savefig(target, format="svg", metadata=undated, transparent=inline)


def _write_png(figure: Figure, target: Any) -> None:
    """With a palette of 256 colours: half as large, and these pictures have few."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib brings it

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = bytes(canvas.buffer_rgba())
    picture = Image.frombytes("RGBA", canvas.get_width_height(), pixels).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(
        target, format="png", optimize=True, dpi=(figure.dpi, figure.dpi)
    )
