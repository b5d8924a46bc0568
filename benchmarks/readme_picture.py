"""Draws docs/accuracy.svg from result files: top-1 against bit operations and measured time, for each way to get there.

    python benchmarks/readme_picture.py            draw it
    python benchmarks/readme_picture.py --check    exit 1 where it does not show what the files say

Networks are gathered by their way and budget: the mean of all recipes and seeds, with a bar from the lowest to the
highest; times are those of one image at a time (`bench_milliseconds.py`). Published points are hollow, against the
float network they were published with. The background is white, so that it reads the same on a light and on a dark
page. The points are written into the file, which is what --check compares: how a line is drawn depends on the release
of matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from lbs.reporting.published import FLOAT, MARKS

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "accuracy.svg"
NETWORKS = {"cifar100-resnet20": "ResNet-20, CIFAR-100", "cifar100-resnet56": "ResNet-56, CIFAR-100"}
MOST = 10.0  # percent of the bit operations: of published points, those that are drawn
MODELS = {"cifar_resnet20": "cifar100-resnet20", "cifar_resnet56": "cifar100-resnet56"}
# Way -> color and marker: colors of Okabe and Ito, which all eyes tell apart, and shapes besides.
SEARCHED, UNTRAINED = "searched (bits and filters)", "lbs.quantize, no training"
EVENLY = "uniform, evenly pruned"
WAYS = {
    SEARCHED: ("#0072B2", "o"),
    "greedy": ("#D55E00", "^"),
    "uniform 4 bits, fine-tuned": ("#000000", "s"),
    "uniform 8 bits, fine-tuned": ("#CC79A7", "v"),
    EVENLY: ("#E69F00", "P"),
    UNTRAINED: ("#009E73", "D"),
    "published": ("#777777", "*"),
}
VARIANTS = {"joint": SEARCHED, "greedy": "greedy", **{f"uniform-{n}": f"uniform {n} bits, fine-tuned" for n in (4, 8)}}
CONTENDERS = {
    "searched": SEARCHED,
    "greedy": "greedy",
    **{f"uniform {n} without": EVENLY for n in (4, 8)},
    **{f"uniform {n}": f"uniform {n} bits, fine-tuned" for n in (4, 8)},
    "8 bits, not": UNTRAINED,
}
OPERATIONS, TIME = "bit operations, % of float (log scale)", "microseconds an image, measured"
# Network -> cost -> way -> (cost, lowest, mean and highest difference to float in points).
Points = dict[str, dict[str, dict[str, list[tuple[float, float, float, float]]]]]


def points(root: Path = ROOT) -> Points:
    """All that the files hold, networks whose weights were pruned to zeros left out."""
    groups: dict[tuple[str, str, str, Any], list[tuple[float, float]]] = {}
    for file in sorted((root / "benchmarks" / "results").glob("*/*.json")):
        body = json.loads(file.read_text())
        if body.get("network") in NETWORKS and body["packed_top1"] is not None:
            way = _way(VARIANTS, body["variant"])
            if way is not None:
                key = (body["network"], OPERATIONS, way, (body["target_bops"] or body["bops"], body["variant"]))
                groups.setdefault(key, []).append(_point(body, body["packed_top1"]))
        elif body.get("level") == "quantization" and body["header"]["model"] in MODELS:
            for index, row in enumerate(row for row in body["rows"] if not row["zeros"]):
                key = (MODELS[body["header"]["model"]], OPERATIONS, UNTRAINED, index)
                groups[key] = [_point(row, row["top1"])]
        elif body.get("level") == "milliseconds" and body["header"]["row"] in NETWORKS:
            for row in (row for row in body["rows"] if row["batch"] == 1):
                way = _way(CONTENDERS, row["contender"])
                if way is not None:
                    key = (body["header"]["row"], TIME, way, (file.parent.name, row["contender"]))
                    groups.setdefault(key, []).append((1e6 * row["median"], row["top1"] - row["float_top1"]))
    floats = {mark.network: mark for mark in MARKS if mark.method == FLOAT}
    for mark in MARKS:
        share = 100 * mark.bops / floats[mark.network].bops
        if mark.network in NETWORKS and share < MOST:
            difference = mark.top1 - floats[mark.network].top1
            groups[mark.network, OPERATIONS, "published", mark.method] = [(share, difference)]
    found: Points = {network: {cost: {} for cost in (OPERATIONS, TIME)} for network in NETWORKS}
    for (network, cost, way, _), group in sorted(groups.items(), key=lambda one: str(one[0])):
        middle, lost = mean(value for value, _ in group), [difference for _, difference in group]
        figures = (round(middle, 3), round(min(lost), 2), round(mean(lost), 2), round(max(lost), 2))
        found[network][cost].setdefault(way, []).append(figures)
    return found


def _way(ways: Mapping[str, str], name: str) -> str | None:
    """The way whose key a name starts with."""
    return next((way for start, way in ways.items() if name.startswith(start)), None)


def _point(body: Mapping[str, Any], top1: float) -> tuple[float, float]:
    return 100 * body["bops"] / body["full_precision_bops"], top1 - body["float_top1"]


def draw(found: Points, path: Path, **options: Any) -> None:
    """A column for each network: bit operations above, times below where some were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    costs = [cost for cost in (OPERATIONS, TIME) if cost == OPERATIONS or any(one[cost] for one in found.values())]
    style = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "lbs", "axes.spines.top": False}
    with mpl.rc_context({**style, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd"}):
        size = (8.4, 1.0 + 3.1 * len(costs))
        figure, panels = plt.subplots(len(costs), 2, figsize=size, sharey="row", facecolor="white", squeeze=False)
        for row, cost in zip(panels, costs, strict=True):
            for panel, (network, title) in zip(row, NETWORKS.items(), strict=True):
                _panel(panel, found[network][cost], title, cost)
            row[0].set_ylabel("top-1 against float, points")
        shown = [way for way in WAYS if any(way in one[cost] for one in found.values() for cost in costs)]
        handles = [Line2D([], [], linestyle="", label=way, **_look(way)) for way in shown]
        figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, (0.1 + 0.23 * -(-len(shown) // 3)) / size[1], 1, 1))
        figure.savefig(path, facecolor="white", **options)
        plt.close(figure)


def _look(way: str) -> dict[str, Any]:
    color, marker = WAYS[way]
    return {"color": color, "marker": marker, "markersize": 7, **({"fillstyle": "none"} if way == "published" else {})}


def _panel(panel: Any, ways: Mapping[str, list[tuple[float, float, float, float]]], title: str, cost: str) -> None:
    """One network over one cost; no axes where nothing is known."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    if not ways:
        panel.set_axis_off()
        panel.text(0.5, 0.5, f"{title}:\nnot measured", ha="center", va="center", transform=panel.transAxes)
        return
    panel.axhline(0, color="#777777", linewidth=1)
    for way, figures in ways.items():
        values, low, middle, high = zip(*figures, strict=True)
        panel.vlines(values, low, high, color=WAYS[way][0], linewidth=2, alpha=0.6)
        panel.plot(values, middle, linestyle="", **_look(way))
    panel.set(title=title, xlabel=cost)
    if cost == OPERATIONS:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator([0.6, 1, 1.5, 2, 3, 4, 6]))
        panel.xaxis.set_minor_locator(FixedLocator([]))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    else:
        panel.margins(x=0.1)


def told(found: Mapping[str, Any]) -> str:
    """The points as they stand in the picture's description."""
    return json.dumps(found, separators=(",", ":"))


def main() -> int:
    """Draw or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the picture is out of date")
    parser.add_argument("--out", type=Path, default=PICTURE, help="a .svg, or a .png to look at")
    args = parser.parse_args()
    found = points()
    if args.check:
        if shows(PICTURE.read_text(), found):
            return 0
        print("docs/accuracy.svg does not show what the result files say; run: python benchmarks/readme_picture.py")
        return 1
    metadata = {"Date": None, "Description": told(found)} if args.out.suffix == ".svg" else {}
    draw(found, args.out, metadata=metadata, dpi=100)
    print(f"wrote {args.out}")
    return 0


def shows(picture: str, found: Points) -> bool:
    """Whether a picture was drawn from these points."""
    return told(found) in picture


if __name__ == "__main__":
    sys.exit(main())
