"""Pictures of several runs: accuracy against bit operations, published points as marks, and accuracy by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from lbs.reporting.plots import INK, QUIET
from lbs.reporting.published import Mark
from lbs.reporting.units import plain

# Points closer than this factor to the runs' mean cost are drawn again, enlarged.
_CLOSE = 1.35
_SHAPES = "sD^v<>ph8"
_GREYS = ("#4b5763", "#8a94a0")


@dataclass(frozen=True)
class Point:
    """One run: bit operations of one image, top-1 in percent."""

    name: str
    bops: float
    top1: float


def accuracy_over_cost(points: list[Point], marks: list[Mark]) -> Figure:
    """Runs in colour, joined where none is both cheaper and better; published points hollow; the crowd enlarged."""
    middle = geometric_mean(point.bops for point in points)
    close = [mark for mark in marks if 1 / _CLOSE < mark.bops / middle < _CLOSE]
    crowded = bool(close) and all(1 / _CLOSE < point.bops / middle < _CLOSE for point in points)
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if crowded else 1, squeeze=False)[0]
    for panel, shown in zip(panels, (marks, close), strict=False):
        _draw(panel, points, marks, shown)
    costs = [*(point.bops for point in points), *(mark.bops for mark in marks)]
    if max(costs) > 10 * min(costs):  # on less than a decade a logarithmic axis has no labels
        panels[0].set_xscale("log")
        panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("top-1 accuracy, %")
    if crowded:
        panels[0].set_title("All")
        panels[1].set_title("Near these runs")
        panels[1].xaxis.set_major_locator(MaxNLocator(5))
    for panel in panels:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlabel("bit operations per image")
        panel.margins(x=0.08, y=0.12)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8.5)
    return figure


def _draw(panel: Axes, points: list[Point], marks: list[Mark], shown: list[Mark]) -> None:
    for index, mark in enumerate(marks):
        if mark in shown:
            style = {"marker": _SHAPES[index % len(_SHAPES)], "color": _GREYS[index % 2]}
            panel.plot(
                [mark.bops],
                [mark.top1],
                linestyle="",
                markerfacecolor="none",
                markersize=7,
                label=f"{mark.method} (published)",
                **style,  # type: ignore[arg-type]
            )
    front = frontier(points)
    if len(front) > 1:
        panel.plot([p.bops for p in front], [p.top1 for p in front], color=QUIET, linewidth=1, zorder=1)
    colors = _colors(len(points))
    for point, color in zip(points, colors, strict=True):
        panel.plot(
            [point.bops], [point.top1], "o", color=color, markeredgecolor=INK, markersize=8, label=plain(point.name)
        )


def frontier(points: list[Point]) -> list[Point]:
    """The points that no other beats in both, from the cheapest on.

    >>> [p.name for p in frontier([Point("a", 2, 60), Point("b", 1, 50), Point("c", 3, 55)])]
    ['b', 'a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bops, -p.top1)):
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return best


def curves(epochs: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Test accuracy of every run by epoch; None where none was measured."""
    known = {
        name: [(row["epoch"], 100 * row["test_accuracy"]) for row in rows if row.get("test_accuracy") is not None]
        for name, rows in epochs.items()
    }
    if not any(known.values()):
        return None
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for (name, pairs), color in zip(known.items(), _colors(len(known)), strict=True):
        if pairs:
            axis.plot(*zip(*pairs, strict=True), "o-", color=color, markersize=3.5, linewidth=1.4, label=plain(name))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel("top-1 accuracy, %")
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure


def _colors(count: int) -> list[Any]:
    palette = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    return [palette[i % len(palette)] for i in range(count)]
