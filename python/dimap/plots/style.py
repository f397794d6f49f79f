"""How all pictures look: size, fonts, colours; and how they are written.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart with any colour vision; no
picture tells things apart by colour alone. Figures are made without pyplot: no window or display is
needed, and matplotlib's settings are as before when a picture is there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from .._errors import need
from .._files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, FAINT, GREY, PAPER = "#262626", "#D9D9D9", "#8C8C8C", "#FFFFFF"

MODULES = {"qkv": BLUE, "proj": ORANGE, "mlp": GREEN}
OTHERS = (VERMILLION, PURPLE, SKY, INK)  # for modules of a caller's own
FORMATS = (".png", ".svg")
DPI = 120  # 8 inches are 960 pixels: sharp in a README, which shows some 830
WIDTH = 8.0  # inches
TEXT = 9.0  # points

# Quiet axes: no box, thin ticks, a faint grid where it is asked for. Words stand as they are: a pair
# of dollar signs is no mathematics.
LOOK = {
    "figure.dpi": DPI, "figure.facecolor": PAPER, "figure.constrained_layout.use": True,
    "font.size": TEXT, "figure.titlesize": TEXT + 1, "axes.titlesize": TEXT,
    "axes.labelsize": TEXT, "xtick.labelsize": TEXT - 1, "ytick.labelsize": TEXT - 1,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "text.parse_math": False,
    "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.major.size": 3, "ytick.major.size": 3, "lines.linewidth": 1.4, "lines.markersize": 4.5,
    "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.fontsize": TEXT - 0.5, "legend.handlelength": 3,
    "svg.hashsalt": "dimap",
}  # fmt: skip
_DRAWING = RLock()  # two threads would put back each other's settings


@contextmanager
def looking() -> Iterator[None]:
    """While a picture is drawn, matplotlib's settings are LOOK. Also decorates what draws one.

    Raises ModuleNotFoundError without matplotlib.
    """
    check_path(None)
    import matplotlib

    with _DRAWING, matplotlib.rc_context(LOOK):
        yield


def module_colors(modules: Iterable[str]) -> dict[str, str]:
    """The colour of every module of a picture."""
    spare = cycle(OTHERS)
    return {name: MODULES.get(name) or next(spare) for name in dict.fromkeys(modules)}


def width_of(words: str, size: float = TEXT) -> float:
    """How wide words of `size` points are, in inches."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), words, size=size).get_extents().x1) / 72 if words else 0.0


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Raise where a picture could not be written to `path`, before any work.

    ModuleNotFoundError without matplotlib, ValueError for an ending that is not .png or .svg,
    FileNotFoundError for a folder that is not there.
    """
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"a picture's path must end in {' or '.join(FORMATS)}, got {path}")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "must be in a folder that is there", str(path))
    install = "'torch-dimap[plot]', or '.[plot]' from a checkout"
    need("matplotlib", "pictures need", install=install)


def finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure where a path is given, complete or not at all; a file there is replaced."""
    figure.draw_without_rendering()  # ticks are made when they are drawn: now, in our look
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

    undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with looking(), matplotlib.rc_context({"svg.fonttype": "none" if inline else "path"}):
        back = "none" if inline else "auto"
        figure.savefig(target, format="svg", metadata=undated, facecolor=back)


def _write_png(figure: Figure, target: Any) -> None:
    """With a palette of 256 colours: half as large, and these pictures have few."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib brings it

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    size, pixels = canvas.get_width_height(), canvas.buffer_rgba()
    picture = Image.frombytes("RGBA", size, bytes(pixels)).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(
        target, format="png", optimize=True, dpi=(figure.dpi, figure.dpi)
    )
