"""Pictures of several runs: accuracy against what a network costs, published points as marks, and accuracy by epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lbs.reporting.published import Mark
from lbs.reporting.style import GREYS, INK, QUIET, SERIES, panel
from lbs.reporting.units import plain

# Points closer than this factor to the runs' mean cost are drawn again, enlarged.
_CLOSE = 1.35
_SHAPES = "sD^v<>ph8"


@dataclass(frozen=True)
class Point:
    """One run: what one image costs, in any unit, and top-1 in percent."""

    name: str
    cost: float
    top1: float


def accuracy_over_cost(points: list[Point], marks: dict[Mark, int], label: str, told: Callable[[float], str]) -> Figure:
    """Runs in colour, joined where none is both cheaper and better; published points hollow; names below.

    marks: each with its number, by which it looks the same in every picture.
    """
    figure, axis = panel(3.1 + 0.19 * (len(points) + len(marks)))
    for mark, index in marks.items():
        axis.plot(
            [mark.bops], [mark.top1], linestyle="", markerfacecolor="none", markersize=7,
            label=f"{mark.method} (published)", marker=_SHAPES[index % len(_SHAPES)], color=GREYS[index % 2],
        )  # fmt: skip
    front = frontier(points)
    if len(front) > 1:
        axis.plot([p.cost for p in front], [p.top1 for p in front], color=QUIET, linewidth=1, zorder=1)
    for point, color in zip(points, _colors(len(points)), strict=True):
        axis.plot(
            [point.cost], [point.top1], "o", color=color, markeredgecolor=INK, markersize=8, label=plain(point.name)
        )
    _cost_axis(axis, [*(point.cost for point in points), *(mark.bops for mark in marks)], told)
    axis.set_xlabel(label)
    axis.set_ylabel("top-1 accuracy, %")
    axis.margins(x=0.08, y=0.12)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", fontsize=8.5)
    return figure


def _cost_axis(axis: Axes, costs: list[float], told: Callable[[float], str]) -> None:
    if max(costs) > 10 * min(costs):  # on less than a decade a logarithmic axis has no labels
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=5))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value)))


def crowd(points: list[Point], marks: dict[Mark, int]) -> dict[Mark, int]:
    """The published points near the runs, where all runs lie so near to one another that a picture enlarges them."""
    middle = geometric_mean(point.cost for point in points)
    close = {mark: index for mark, index in marks.items() if 1 / _CLOSE < mark.bops / middle < _CLOSE}
    return close if all(1 / _CLOSE < point.cost / middle < _CLOSE for point in points) else {}


def frontier(points: list[Point]) -> list[Point]:
    """The points that no other beats in both, from the cheapest on.

    >>> [p.name for p in frontier([Point("a", 2, 60), Point("b", 1, 50), Point("c", 3, 55)])]
    ['b', 'a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.top1)):
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
    figure, axis = panel(3.1 + 0.19 * len(known))
    for (name, pairs), color in zip(known.items(), _colors(len(known)), strict=True):
        if pairs:
            axis.plot(*zip(*pairs, strict=True), "o-", color=color, markersize=3.5, linewidth=1.4, label=plain(name))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel("top-1 accuracy, %")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", fontsize=8.5)
    return figure


def _colors(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]
