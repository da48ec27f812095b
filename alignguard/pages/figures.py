"""Figures as inline SVG whose colours follow the page, so that they read in light and in dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Matplotlib draws in these stand-ins; in the SVG they become variables of the page's style sheet.
INK, DIM, LINE = "#010203", "#040506", "#070809"

MODELS = {"base": "#0a0b0c", "plain": "#0d0e0f", "guarded": "#101112"}

# With what holds where no style sheet sets the variable, as in a notebook.
_VARIABLES = {
    INK: "var(--ink, currentColor)",
    DIM: "var(--dim, currentColor)",
    LINE: "var(--line, #9e9e9e80)",
    MODELS["base"]: "var(--base, #808080)",
    MODELS["plain"]: "var(--plain, #808080)",
    MODELS["guarded"]: "var(--guarded, #00968a)",
}

PALETTE = [
    "#00968a",
    "#e0823d",
    "#4c8bf5",
    "#c65bb4",
    "#8f7ae5",
    "#b79b2c",
    "#d9536a",
    "#808890",
]  # read on both grounds

# From nothing to full, for matrices: small values show the page's ground.
SHADES = LinearSegmentedColormap.from_list("shades", [(0.0, 0.59, 0.54, 0.0), (0.0, 0.59, 0.54, 1.0)])

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": DIM,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": DIM,
    "ytick.labelcolor": DIM,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def _svg(figure: Figure, name: str, alt: str) -> str:
    """A drawn figure as one <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-labelledby="{name}-title" xmlns="http://www.w3.org/2000/svg" '
    head += f'xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{name}-title">{escape(alt)}</title>'
    return head + text[text.index(">") + 1 :].strip()


def draw_svg(draw: Callable[[Figure], None], name: str, alt: str, width: float = 5.2, height: float = 3.0) -> str:
    """Draw a figure and return it as one <svg> element with a title, ids of its own and the page's colours."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        return _svg(figure, name, alt)


class _Words(RendererAgg):
    """Notes where words come to stand while a figure is drawn."""

    def __init__(self, figure: Figure) -> None:
        width, height = figure.bbox.size
        super().__init__(int(width), int(height), figure.dpi)
        self.said: list[tuple[str, np.ndarray]] = []

    def draw_text(
        self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, ismath: Any = False, mtext: Any = None
    ) -> None:
        """Note the box of one line of text: least and largest x and y, in pixels from the top left."""
        width, height, descent = self.get_text_width_height_descent(s, prop, ismath)
        turn = np.exp(-1j * np.radians(angle))  # y points down
        corners = complex(x, y) + turn * np.array([w + 1j * h for w in (0, width) for h in (descent, descent - height)])
        if s.strip():
            box = [corners.real.min(), corners.imag.min(), corners.real.max(), corners.imag.max()]
            self.said.append((s, np.array(box)))


def _check_words(figure: Figure, name: str) -> None:
    """Refuse a figure in which words cover one another or are cut off; DejaVu's letters are wider than most pages'."""
    paper = _Words(figure)
    figure.draw(paper)
    width, height = figure.bbox.size
    for said, (left, top, right, bottom) in paper.said:
        if min(left, top) < -1 or right > width + 1 or bottom > height + 1:
            raise ValueError(f"figure {name}: {said!r} is cut off at the edge; give it more room")
    for (one, a), (other, b) in itertools.combinations(paper.said, 2):
        if (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) > 1).all():
            raise ValueError(f"figure {name}: {one!r} and {other!r} cover one another; move one of them")


def draw_figure(
    draw: Callable[..., None],
    name: str,
    alt: str,
    caption: str = "",
    width: float = 5.2,
    height: float = 3.0,
    panels: int = 1,
) -> str:
    """Draw a figure for a page of the documentation.

    Args:
        draw: called with the axes of each panel, from left to right, draws on them.
        name: prefix of the SVG's ids, one of its own on a page.
        alt: what is seen, in words, for readers who do not see it.
        caption: HTML below the figure.
        width: inches of the whole figure; the page scales it to its column.
        height: inches.
        panels: number of plots side by side.

    Returns:
        one <figure> element.

    Raises:
        ValueError: there is no alt text, or words of the figure cover one another or are cut off.
    """
    if not alt.strip():
        raise ValueError(f"figure {name}: give alt, what is seen in words")
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        _check_words(figure, name)
        svg = _svg(figure, name, alt)
    return f"<figure>{svg}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
