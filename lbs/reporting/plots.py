"""The pictures of a report. Each function draws one figure from a Record, or gives None where nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lbs.reporting.records import PHASES, Record
from lbs.reporting.units import bops, plain, seconds, size, times

WEIGHTS, ACTIVATIONS, KEPT, FULL, INK, QUIET = "#2f6db3", "#e07b39", "#3f9b6c", "#c9d3de", "#22303c", "#6b7a88"
PHASE_COLORS = {"float": "#8a94a0", "search": WEIGHTS, "finetune": KEPT}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa7b4",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6ebf0",
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def draw(record: Record) -> dict[str, tuple[str, Figure]]:
    """File stem -> (caption, figure), in the order of the page."""
    makers: tuple[tuple[str, str, Callable[[Record], Figure | None]], ...] = (
        ("bits", "Bits and kept filters of every layer", bits_and_filters),
        ("cost", "Bit operations and weight bytes of every layer, before and after", costs),
        ("training", "Training curves", training),
        ("gates", "Gate trajectories: how the search spent its steps", gates),
        ("latency", "Time per batch", latency),
    )
    found = {}
    with matplotlib.rc_context(STYLE):
        for stem, caption, make in makers:
            figure = make(record)
            if figure is not None:
                found[stem] = (caption, figure)
    return found


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")  # no pyplot: no display, no global state


def _layer_axis(axis: Axes, names: list[str]) -> None:
    axis.set_xticks(
        range(len(names)),
        list(map(plain, names)),
        rotation=90 if len(names) > 14 else 40,
        ha="right" if len(names) <= 14 else "center",
    )
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    axis.set_xlim(-0.7, len(names) - 0.3)


def bits_and_filters(record: Record) -> Figure | None:
    """Bars of weight and activation bits above, share of kept filters below."""
    if not record.layers:
        return None
    layers = [row.layer for row in record.layers]
    places = np.arange(len(layers))
    figure = _figure(max(9.0, 0.36 * len(layers) + 1.5), 4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.bar(places - 0.2, [layer.w_bits for layer in layers], 0.38, color=WEIGHTS, label="weights")
    top.bar(places + 0.2, [layer.a_bits for layer in layers], 0.38, color=ACTIVATIONS, label="activations")
    top.set_yticks(sorted({0, 2, 4, 8} | {layer.w_bits for layer in layers}))
    top.set_ylabel("bits")
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    top.set_title("Bits")
    share = [100 * layer.kept_filters / layer.filters for layer in layers]
    bottom.bar(places, [100.0] * len(layers), 0.78, color=FULL)
    bottom.bar(places, share, 0.78, color=KEPT)
    for place, layer, height in zip(places, layers, share, strict=True):
        if layer.kept_filters < layer.filters:
            text = f"{layer.kept_filters}/{layer.filters}"
            vertical = 90 if len(layers) > 14 else 0
            bottom.text(
                place, height / 2, text, ha="center", va="center", color="white", fontsize=7.5, rotation=vertical
            )
    bottom.set_ylabel("% of filters kept")
    bottom.set_title("Filters")
    _layer_axis(bottom, [layer.name for layer in layers])
    return figure


def costs(record: Record) -> Figure | None:
    """Bars on a logarithmic axis: full precision in grey, now in colour; the totals stand in the titles."""
    if not record.layers:
        return None
    figure = _figure(max(9.0, 0.36 * len(record.layers) + 1.5), 4.8)
    panels = figure.subplots(2, 1, sharex=True)
    for axis, title, now, full, unit, less in (
        (panels[0], "Bit operations per image", "bops", "full_bops", bops, "fewer"),
        (panels[1], "Weight bytes", "bytes", "full_bytes", size, "smaller"),
    ):
        before, after = [getattr(r, full) for r in record.layers], [getattr(r, now) for r in record.layers]
        places = np.arange(len(before))
        axis.bar(places, before, 0.78, color=FULL, label="32 bits, all filters")
        axis.bar(places, after, 0.78, color=WEIGHTS, label="searched")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: unit(value)))
        axis.set_ylim(min(after) / 2, max(before) * 2)
        ratio = times(sum(before) / sum(after))
        axis.set_title(f"{title}: {unit(sum(before))} before, {unit(sum(after))} after ({ratio} {less})")
        axis.grid(visible=False, axis="x")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    _layer_axis(panels[1], [row.layer.name for row in record.layers])
    return figure


def training(record: Record) -> Figure | None:
    """Accuracy and loss per epoch, the phases one after the other."""
    phases = [phase for phase in PHASES if record.epochs(phase)]
    if not phases:
        return None
    figure = _figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    start = 0.0
    for phase in phases:
        rows = record.epochs(phase)
        x = start + np.arange(1, len(rows) + 1)
        color = PHASE_COLORS[phase]
        for axis in (left, right):
            axis.axvspan(start + 0.5, start + len(rows) + 0.5, color=color, alpha=0.07, linewidth=0)
        _curve(left, x, rows, "train_accuracy", 100, color, "o--" if len(rows) == 1 else "--", f"{phase}, train")
        _curve(left, x, rows, "test_accuracy", 100, color, "o-", f"{phase}, test")
        _curve(right, x, rows, "task_loss", 1, color, "o-" if len(rows) < 3 else "-", phase)
        start += len(rows)
    left.set_title("Top-1 accuracy")
    left.set_ylabel("%")
    right.set_title("Training loss, without the budget term")
    for axis in (left, right):
        axis.set_xlabel("epoch, phases one after the other")
        axis.set_xlim(0.5, start + 0.5)
        axis.legend(fontsize=8.5)
    return figure


def _curve(
    axis: Axes, x: Any, rows: list[dict[str, Any]], key: str, unit: float, color: str, style: str, label: str
) -> None:
    known = [(place, unit * row[key]) for place, row in zip(x, rows, strict=True) if row.get(key) is not None]
    if known:
        axis.plot(*zip(*known, strict=True), style, color=color, label=label, markersize=3.2, linewidth=1.4)


def gates(record: Record) -> Figure | None:
    """Cost against target, and one map per kind of gate: layers down, steps across."""
    rows = record.gates()
    if not rows:
        return None
    names = list(rows[0]["gates"])
    steps = [row["step"] for row in rows]
    full = {row.layer.name: row.layer.filters for row in record.layers}
    figure = _figure(9.6, 2.4 + 0.17 * len(names) + 0.6)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.9, 0.17 * len(names) + 0.5))
    _cost_curve(figure.add_subplot(grid[0, :]), record, rows, steps)
    panels = [figure.add_subplot(grid[1, 0])]
    panels += [figure.add_subplot(grid[1, i], sharey=panels[0]) for i in (1, 2)]
    values = np.array([[row["gates"][name] for name in names] for row in rows], dtype=float)  # [steps, layers, 3]
    most = np.array([full.get(name, values[:, i, 2].max()) for i, name in enumerate(names)])
    widths = sorted({int(b) for b in values[:, :, :2].ravel()} | {2, 4, 8})
    colors = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 0.85, len(widths))))
    bounds = BoundaryNorm([widths[0] - 0.5, *[w + 0.5 for w in widths]], len(widths))
    for panel, index, title in ((panels[0], 0, "Weight bits"), (panels[1], 1, "Activation bits")):
        picture = _map(panel, values[:, :, index], cmap=colors, norm=bounds)
        panel.set_title(title)
    bar = figure.colorbar(picture, ax=panels[1], ticks=widths, pad=0.02, aspect=30)
    bar.ax.tick_params(length=0)
    shares = _map(panels[2], 100 * values[:, :, 2] / most, cmap="Greens", vmin=0, vmax=100)
    panels[2].set_title("% of filters kept")
    figure.colorbar(shares, ax=panels[2], pad=0.02, aspect=30)
    panels[0].set_yticks(range(len(names)), list(map(plain, names)), fontsize=7.5)
    for panel in panels:
        panel.set_xlabel("step")
        count = min(4, len(steps))
        places = np.unique(np.linspace(0, len(steps) - 1, count).astype(int))
        panel.set_xticks(places, [str(steps[i]) for i in places])
    for panel in panels[1:]:
        panel.tick_params(labelleft=False)
    return figure


def _map(panel: Axes, values: Any, **style: Any) -> Any:
    panel.grid(visible=False)
    panel.tick_params(length=0)
    return panel.imshow(values.T, aspect="auto", interpolation="nearest", **style)


def _cost_curve(axis: Axes, record: Record, rows: list[dict[str, Any]], steps: list[int]) -> None:
    axis.plot(
        steps, [row["bops"] for row in rows], "o-", color=WEIGHTS, markersize=3.2, linewidth=1.4, label="bit operations"
    )
    target, final = record.value("search", "target_bops"), record.value("search", "bops")
    if target:
        axis.axhline(target, color=ACTIVATIONS, linewidth=1.2, linestyle="--", label=f"target {bops(target)}")
    if final:
        axis.plot(steps[-1:], [final], "D", color=KEPT, markersize=6, label=f"result {bops(final)}", zorder=3)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bops(value)))
    axis.set_ylim(bottom=0)
    axis.set_title("Bit operations per image under the present gates")
    axis.set_xlabel("step")
    axis.legend(fontsize=8.5, loc="best")


def latency(record: Record) -> Figure | None:
    """Bars per contender and batch, whiskers from the 20th to the 80th percentile."""
    rows = record.bench_rows()
    if not rows:
        return None
    batches = sorted({row["batch"] for row in rows})
    most = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    figure = _figure(9.0, 1.1 + 0.42 * most)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        here = [row for row in rows if row["batch"] == batch]
        median = np.array([row["median"] for row in here])
        spread = np.array([[row["median"] - row["p20"] for row in here], [row["p80"] - row["median"] for row in here]])
        colors = [KEPT if row["contender"] == "packed" else FULL for row in here]
        panel.barh(range(len(here)), median, 0.66, color=colors, xerr=np.abs(spread), ecolor=QUIET, capsize=2)
        panel.set_yticks(range(len(here)), [plain(row["contender"]) for row in here])
        panel.invert_yaxis()
        ratios: dict[str, float] = next((row.get("ratios", {}) for row in here if row["contender"] == "packed"), {})
        for place, row in enumerate(here):
            ratio = ratios.get(row["contender"])
            text = seconds(row["median"]) + (f"  ({times(ratio)})" if ratio else "")
            panel.text(row["p80"] + 0.015 * median.max(), place, text, va="center", fontsize=8.5)
        panel.set_xlim(0, 1.38 * max(row["p80"] for row in here))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:g} ms"))
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
        panel.set_title(f"Batch {batch} (times packed is faster)")
    return figure
