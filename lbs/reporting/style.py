"""How pictures look: one narrow panel each, that a phone shows whole, in colours that a dark page swaps for others.

A picture is an SVG image that carries its dark colours with it, under `prefers-color-scheme`: browsers follow it in a
page and in the file alone, other programs show the light ones.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from lbs.reporting.units import plain

WIDTH = 4.0  # inches, 384 pixels on a screen: cards of a page are 320 to 420 wide
_MOST_NAME = 26  # characters of a name on an axis

INK, QUIET, EDGE, GRID, BACK = "#22303c", "#6b7a88", "#9aa7b4", "#e6ebf0", "#ffffff"
WEIGHTS, ACTIVATIONS, KEPT, FULL, EVEN = "#2f6db3", "#e07b39", "#3f9b6c", "#c9d3de", "#8a94a0"
GREYS = ("#4b5763", "#8b95a1")
SERIES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
DARK = {
    INK: "#e3eaf1",
    QUIET: "#a3b1bf",
    EDGE: "#5d6c7a",
    GRID: "#2d3843",
    BACK: "#1b232b",  # of a card in base.html
    WEIGHTS: "#6aa5e8",
    ACTIVATIONS: "#f0975a",
    KEPT: "#5cc08d",
    FULL: "#4d5c6b",
    EVEN: "#8f9aa6",
    GREYS[0]: "#aeb9c4",
    GREYS[1]: "#84909c",
    SERIES[0]: "#5fb0ea",
    SERIES[4]: "#b794dc",
    SERIES[5]: "#c48f81",
    SERIES[7]: "#a5a5a5",
}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": EDGE,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": BACK,
    "svg.hashsalt": "lbs",  # equal figures give equal text
}
_DARK_RULES = "".join(
    f'[style*="fill: {light}"]{{fill:{dark}!important}}[style*="stroke: {light}"]{{stroke:{dark}!important}}'
    for light, dark in DARK.items()
)


def panel(height: float) -> tuple[Figure, Axes]:
    """An empty picture of one panel, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")  # no pyplot: no display, no global state
    return figure, figure.subplots()


def legend_above(figure: Figure, axis: Axes, columns: int = 2) -> None:
    """The legend of an axis in lines above it, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2)


def axis_name(name: str) -> str:
    """A name as an axis shows it: no formula, and the middle of a long one left out.

    >>> axis_name("conv$1"), axis_name("a" * 20 + "b" * 20)
    ('conv\\\\$1', 'aaaaaaaaaaaa…bbbbbbbbbbbb')
    """
    half = _MOST_NAME // 2 - 1
    return plain(name if len(name) <= _MOST_NAME else f"{name[:half]}…{name[-half:]}")


def rows_axis(axis: Axes, names: list[str], label: str) -> None:
    """Names down the left side, the first at the top."""
    axis.set_yticks(range(len(names)), [axis_name(name) for name in names], fontsize=9 if len(names) <= 24 else 8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_ylabel(label)


def rows_height(count: int) -> float:
    """Inches of a picture of that many rows."""
    return 1.25 + (0.21 if count <= 24 else 0.17) * count


def log_axis(axis: Axes, unit: str, low: float, high: float) -> None:
    """A logarithmic axis below, labelled at powers of ten with `unit`, few enough for a narrow picture."""
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(LogLocator(numticks=5))
    axis.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    axis.xaxis.set_minor_formatter(NullFormatter())


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file with both schemes of colours; letters are outlines, so no font is needed."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    own = f"@media (prefers-color-scheme: dark){{{_DARK_RULES}}}"
    return buffer.getvalue().replace(b"</style>", own.encode() + b"</style>", 1)
