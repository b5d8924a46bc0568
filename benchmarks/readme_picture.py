"""Draws docs/accuracy.svg from result files: top-1 against bit operations, for each way to get there.

    python benchmarks/readme_picture.py            draw it
    python benchmarks/readme_picture.py --check    exit 1 where it does not show what the files say

Searched networks are gathered by their way and budget: the mean of all recipes and seeds, with a bar from the lowest to
the highest. The background is white, so that it reads the same on a light and on a dark page. Its points are written
into the file, which is what --check compares: how a line is drawn depends on the release of matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "accuracy.svg"
NETWORKS = {"cifar100-resnet20": "ResNet-20, CIFAR-100", "cifar100-resnet56": "ResNet-56, CIFAR-100"}
MODELS = {"cifar_resnet20": "cifar100-resnet20", "cifar_resnet56": "cifar100-resnet56"}
# Way -> color and marker: colors of Okabe and Ito, which all eyes tell apart, and shapes besides.
WAYS = {
    "searched (bits and filters)": ("#0072B2", "o"),
    "greedy": ("#D55E00", "^"),
    "uniform 4 bits, fine-tuned": ("#000000", "s"),
    "lbs.quantize, no training": ("#009E73", "D"),
}
VARIANTS = dict(zip(("joint", "greedy", "uniform"), WAYS, strict=False))
# Network -> way -> (percent of bit operations, lowest, mean and highest difference to float in points).
Points = dict[str, dict[str, list[tuple[float, float, float, float]]]]


def points(root: Path = ROOT) -> Points:
    """All that the files hold, networks whose weights were pruned to zeros left out."""
    groups: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for file in sorted((root / "benchmarks" / "results").glob("*/*.json")):
        body = json.loads(file.read_text())
        if body.get("network") in NETWORKS and body["packed_top1"] is not None:
            way = next((way for start, way in VARIANTS.items() if body["variant"].startswith(start)), None)
            if way is not None:
                key = (body["network"], way, body["target_bops"] or body["bops"])
                groups.setdefault(key, []).append(_point(body, body["packed_top1"]))
        elif body.get("level") == "quantization" and body["header"]["model"] in MODELS:
            for index, row in enumerate(row for row in body["rows"] if not row["zeros"]):
                groups[MODELS[body["header"]["model"]], "lbs.quantize, no training", index] = [_point(row, row["top1"])]
    found: Points = {network: {way: [] for way in WAYS} for network in NETWORKS}
    for (network, way, _), group in sorted(groups.items()):
        share, lost = mean(share for share, _ in group), [points for _, points in group]
        figures = (round(share, 3), round(min(lost), 2), round(mean(lost), 2), round(max(lost), 2))
        found[network][way].append(figures)
    return found


def _point(body: Mapping[str, Any], top1: float) -> tuple[float, float]:
    return 100 * body["bops"] / body["full_precision_bops"], top1 - body["float_top1"]


def draw(found: Points, path: Path, **options: Any) -> None:
    """Two panels side by side, one for each network."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter

    style = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "lbs", "axes.spines.top": False}
    with mpl.rc_context({**style, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd"}):
        figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.0), sharey=True, facecolor="white")
        for panel, (network, title) in zip(panels, NETWORKS.items(), strict=True):
            panel.axhline(0, color="#777777", linewidth=1)
            for way, (color, marker) in WAYS.items():
                shares, low, middle, high = zip(*(found[network][way] or [(math.nan,) * 4]), strict=True)
                panel.vlines(shares, low, high, color=color, linewidth=2, alpha=0.6)
                panel.plot(shares, middle, marker, color=color, markersize=7, label=way)
            panel.set(title=title, xscale="log", xlabel="bit operations, % of float (log scale)")
            panel.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 6]))
            panel.xaxis.set_minor_locator(FixedLocator([]))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        panels[0].set_ylabel("top-1 against float, points")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
        figure.tight_layout(rect=(0, 0.13, 1, 1))
        figure.savefig(path, facecolor="white", **options)
        plt.close(figure)


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
