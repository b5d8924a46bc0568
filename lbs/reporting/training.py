"""Pictures of how a network came about: accuracy and loss by epoch, and what the gates of a search did."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lbs.reporting.records import PHASES, Record
from lbs.reporting.style import ACTIVATIONS, EVEN, KEPT, WEIGHTS, legend_above, panel, rows_axis, rows_height
from lbs.reporting.units import bops

PHASE_COLORS = {"float": EVEN, "search": WEIGHTS, "finetune": KEPT}
_BOTH = (("train_accuracy", "--", "train"), ("test_accuracy", "o-", "test"))
_CURVES = {  # file stem -> caption, axis, unit, (key, line, name)
    "accuracy": ("Accuracy by epoch", "top-1 accuracy, %", 100, _BOTH),
    "loss": ("Loss by epoch", "loss of the task", 1, (("task_loss", "o-", "train"),)),
}


def training(record: Record) -> dict[str, tuple[str, Figure]]:
    """Accuracy and loss, the phases one after the other."""
    phases = [phase for phase in PHASES if record.epochs(phase)]
    found = {}
    for stem, (caption, label, unit, keys) in _CURVES.items():
        figure, axis = panel(3.2)
        start, known = 0, 0
        for phase in phases:
            rows, color = record.epochs(phase), PHASE_COLORS[phase]
            axis.axvspan(start + 0.5, start + len(rows) + 0.5, color=color, alpha=0.07, linewidth=0)
            for key, line, name in keys:
                pairs = [(start + 1 + i, unit * row[key]) for i, row in enumerate(rows) if row.get(key) is not None]
                if pairs:
                    style = line if len(pairs) > 1 else "o"
                    axis.plot(*zip(*pairs, strict=True), style, color=color, markersize=3.2, label=f"{phase}, {name}")
                    known += 1
            start += len(rows)
        if known:
            axis.set_xlim(0.5, start + 0.5)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_xlabel("epoch, phases one after the other")
            axis.set_ylabel(label)
            legend_above(figure, axis)
            found[stem] = (caption, figure)
    return found


def gates(record: Record) -> dict[str, tuple[str, Figure]]:
    """Cost against target, and one map per kind of gate: layers down, steps across."""
    rows = record.gates()
    if not rows:
        return {}
    names, steps = list(rows[0]["gates"]), [row["step"] for row in rows]
    full = {row.layer.name: row.layer.filters for row in record.layers}
    values = np.array([[row["gates"][name] for name in names] for row in rows], dtype=float)  # [steps, layers, 3]
    most = np.array([full.get(name, values[:, i, 2].max()) for i, name in enumerate(names)])
    widths = sorted({int(b) for b in values[:, :, :2].ravel()} | {2, 4, 8})
    colors = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 0.85, len(widths))))
    bounds = BoundaryNorm([widths[0] - 0.5, *[w + 0.5 for w in widths]], len(widths))
    by_width: dict[str, Any] = {"cmap": colors, "norm": bounds}
    return {
        "gates-cost": ("Search: bit operations under the present gates", _cost_curve(record, rows, steps)),
        "gates-weights": ("Search: weight bits", _map(values[:, :, 0], names, steps, "bits", widths, **by_width)),
        "gates-activations": (
            "Search: activation bits",
            _map(values[:, :, 1], names, steps, "bits", widths, **by_width),
        ),
        "gates-filters": (
            "Search: filters kept",
            _map(100 * values[:, :, 2] / most, names, steps, "% of filters", None, cmap="Greens", vmin=0, vmax=100),
        ),
    }


def _map(values: Any, names: list[str], steps: list[int], label: str, ticks: list[int] | None, **style: Any) -> Figure:
    figure, axis = panel(rows_height(len(names)))
    picture = axis.imshow(values.T, aspect="auto", interpolation="nearest", **style)
    rows_axis(axis, names, "layer")
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False)
    axis.set_xlabel("step")
    places = np.unique(np.linspace(0, len(steps) - 1, min(4, len(steps))).astype(int))
    axis.set_xticks(places, [str(steps[i]) for i in places])
    bar = figure.colorbar(picture, ax=axis, ticks=ticks, pad=0.02, aspect=30)
    bar.set_label(label)
    bar.ax.tick_params(length=0)
    return figure


def _cost_curve(record: Record, rows: list[dict[str, Any]], steps: list[int]) -> Figure:
    figure, axis = panel(3.2)
    axis.plot(steps, [row["bops"] for row in rows], "o-", color=WEIGHTS, markersize=3.2, label="under the gates")
    target, final = record.value("search", "target_bops"), record.value("search", "bops")
    if target:
        axis.axhline(target, color=ACTIVATIONS, linewidth=1.2, linestyle="--", label=f"target {bops(target)}")
    if final:
        axis.plot(steps[-1:], [final], "D", color=KEPT, markersize=6, label=f"result {bops(final)}", zorder=3)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bops(value)))
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel("step")
    axis.set_ylabel("bit operations per image")
    legend_above(figure, axis)
    return figure
