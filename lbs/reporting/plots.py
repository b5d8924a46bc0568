"""The pictures of one network, before and after. Each function gives pictures by name, none where nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lbs.reporting.records import BEFORE, EVEN8, PACKED, LayerRow, Record
from lbs.reporting.style import (
    ACTIVATIONS,
    EVEN,
    FULL,
    KEPT,
    QUIET,
    STYLE,
    WEIGHTS,
    legend_above,
    log_axis,
    panel,
    rows_axis,
    rows_height,
)
from lbs.reporting.training import gates, training
from lbs.reporting.units import bops, plain, seconds, size, times

Pictures = dict[str, tuple[str, Figure]]  # file stem -> (caption, figure)


def draw(record: Record) -> Pictures:
    """All pictures, in the order of the page."""
    makers: tuple[Callable[[Record], Pictures], ...] = (
        accuracies, latency, bits, filters, operations, weight_bytes, milliseconds, training, gates,
    )  # fmt: skip
    found: Pictures = {}
    with matplotlib.rc_context(STYLE):
        for make in makers:
            found |= make(record)
    return found


def accuracies(record: Record) -> Pictures:
    """Of the float network, of uniform 8 bits and of the packed network."""
    named = (("float32", BEFORE, FULL), ("uniform 8 bits", EVEN8, EVEN), ("packed", PACKED, KEPT))
    known = [(name, record.accuracy(row), color) for name, row, color in named]
    bars = [(name, 100 * value, color) for name, value, color in known if value is not None]
    if len(bars) < 2:
        return {}
    figure, axis = panel(rows_height(len(bars)))
    rows_axis(axis, [name for name, _, _ in bars], "network")
    axis.barh(range(len(bars)), [value for _, value, _ in bars], 0.66, color=[color for _, _, color in bars])
    for place, (_, value, _) in enumerate(bars):
        axis.text(value + 1, place, f"{value:.2f} %", va="center", fontsize=9)
    axis.set_xlim(0, 125)
    axis.set_xticks(range(0, 101, 25))
    images = record.value("bench", "images") if record.value("bench", "accuracy") else None
    axis.set_xlabel(f"top-1 accuracy, % of {images} images" if images else "top-1 accuracy, %")
    return {"top1": ("Accuracy, before and after", figure)}


def bits(record: Record) -> Pictures:
    """Bars of weight and activation bits, layer by layer."""
    if not record.layers:
        return {}
    layers = [row.layer for row in record.layers]
    places = np.arange(len(layers))
    figure, axis = panel(rows_height(len(layers)))
    rows_axis(axis, [layer.name for layer in layers], "layer")
    axis.barh(places - 0.2, [layer.w_bits for layer in layers], 0.36, color=WEIGHTS, label="weights")
    axis.barh(places + 0.2, [layer.a_bits for layer in layers], 0.36, color=ACTIVATIONS, label="activations")
    axis.set_xticks(sorted({0, 2, 4, 8} | {layer.w_bits for layer in layers}))
    axis.set_xlabel("bits (32 before)")
    legend_above(figure, axis)
    return {"bits": ("Bits of every layer", figure)}


def filters(record: Record) -> Pictures:
    """Share of the filters that is kept, with the counts of layers that lost some."""
    if not record.layers:
        return {}
    layers = [row.layer for row in record.layers]
    figure, axis = panel(rows_height(len(layers)))
    rows_axis(axis, [layer.name for layer in layers], "layer")
    axis.barh(range(len(layers)), [100.0] * len(layers), 0.74, color=FULL, label="all filters")
    axis.barh(
        range(len(layers)), [100 * x.kept_filters / x.filters for x in layers], 0.74, color=KEPT, label="kept filters"
    )
    for place, layer in enumerate(layers):
        if layer.kept_filters < layer.filters:
            axis.text(103, place, f"{layer.kept_filters} of {layer.filters}", va="center", fontsize=8)
    axis.set_xlim(0, 135)
    axis.set_xticks(range(0, 101, 25))
    axis.set_xlabel("filters kept, %")
    legend_above(figure, axis)
    return {"filters": ("Filters of every layer", figure)}


def operations(record: Record) -> Pictures:
    """Bit operations of one image."""
    caption = "Bit operations of every layer, one image: {before} before, {after} after ({ratio} fewer)"
    return _before_after(record, "operations", caption, "bit operations", _Amount("full_bops", "bops", bops, ""))


def weight_bytes(record: Record) -> Pictures:
    """Bytes of the weights."""
    caption = "Weight bytes of every layer: {before} before, {after} after ({ratio} smaller)"
    return _before_after(record, "bytes", caption, "bytes", _Amount("full_bytes", "bytes", size, "B"))


class _Amount:
    """What layers take before and after, and how it is told."""

    def __init__(self, before: str, after: str, told: Callable[[float], str], unit: str) -> None:
        self.before: Callable[[LayerRow], int] = lambda row: getattr(row, before)
        self.after: Callable[[LayerRow], int] = lambda row: getattr(row, after)
        self.told, self.unit = told, unit


def _before_after(record: Record, stem: str, caption: str, label: str, amount: _Amount) -> Pictures:
    """Bars on a logarithmic axis: full precision in grey, now in colour."""
    if not record.layers:
        return {}
    before, after = [amount.before(row) for row in record.layers], [amount.after(row) for row in record.layers]
    figure, axis = panel(rows_height(len(before)))
    rows_axis(axis, [row.layer.name for row in record.layers], "layer")
    axis.barh(range(len(before)), before, 0.74, color=FULL, label="32 bits, all filters")
    axis.barh(range(len(before)), after, 0.44, color=WEIGHTS, label="now")  # what is longer hides nothing
    log_axis(axis, amount.unit, min(after) / 2, max(before) * 2)
    axis.set_xlabel(f"{label} (log scale)")
    legend_above(figure, axis)
    ratio = times(sum(before) / sum(after))
    told = caption.format(before=amount.told(sum(before)), after=amount.told(sum(after)), ratio=ratio)
    return {stem: (told, figure)}


def milliseconds(record: Record) -> Pictures:
    """What every layer takes in float32, at uniform 8 bits and packed."""
    layers = [row for row in record.layer_times() if PACKED in row["seconds"]]
    if not layers:
        return {}
    figure, axis = panel(rows_height(len(layers)))
    rows_axis(axis, [str(row["name"]) for row in layers], "layer")
    places = range(len(layers))
    for name, label, style in (
        (BEFORE, "float32", {"color": FULL, "height": 0.74}),
        (PACKED, "packed", {"color": WEIGHTS, "height": 0.5}),
    ):
        known = [row["seconds"].get(name, float("nan")) for row in layers]
        if not np.isnan(known).all():
            axis.barh(places, known, label=label, **style)  # type: ignore[arg-type]
    even = [row["seconds"].get(EVEN8, float("nan")) for row in layers]
    if not np.isnan(even).all():
        axis.plot(even, places, "D", color=ACTIVATIONS, markersize=3.6, label="uniform 8 bits")
    known = [seconds for row in layers for name, seconds in row["seconds"].items() if name in (BEFORE, EVEN8, PACKED)]
    log_axis(axis, "s", min(known) / 2, max(known) * 2)
    batch = next((row["batch"] for row in record.bench_rows()), "?")
    axis.set_xlabel(f"time, batch {batch} (log scale)")
    legend_above(figure, axis, 3)
    return {"milliseconds": ("Time of every layer", figure)}


def latency(record: Record) -> Pictures:
    """For each batch bars by contender, whiskers from the 20th to the 80th percentile."""
    found: Pictures = {}
    rows = record.bench_rows()
    for batch in sorted({row["batch"] for row in rows}):
        here = [row for row in rows if row["batch"] == batch]
        found[f"latency-{int(batch)}"] = (f"Time of a call, batch {batch}", _latency_of(batch, here))
    return found


def _latency_of(batch: int, rows: list[dict[str, Any]]) -> Figure:
    median = np.array([1e3 * row["median"] for row in rows])
    spread = [
        [1e3 * (row["median"] - row["p20"]) for row in rows],
        [1e3 * (row["p80"] - row["median"]) for row in rows],
    ]
    colors = [KEPT if row["contender"] == PACKED else FULL for row in rows]
    figure, axis = panel(rows_height(len(rows)) + 0.12 * len(rows))
    rows_axis(axis, [str(row["contender"]) for row in rows], "network")
    axis.barh(range(len(rows)), median, 0.66, color=colors, xerr=np.abs(np.array(spread)), ecolor=QUIET, capsize=2)
    ratios: dict[str, float] = next((row.get("ratios", {}) for row in rows if row["contender"] == PACKED), {})
    widest = max(1e3 * row["p80"] for row in rows)
    for place, row in enumerate(rows):
        ratio = ratios.get(row["contender"])
        text = seconds(row["median"]) + (f" ({times(ratio)})" if ratio else "")
        axis.text(1e3 * row["p80"] + 0.02 * widest, place, plain(text), va="center", fontsize=8.5)
    axis.set_xlim(0, 1.75 * widest)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel("ms per call (times packed is as fast)")
    return figure
