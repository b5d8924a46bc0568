"""README's two tables, of four rows each: what is left of accuracy at what cost, and times beside two engines."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

Body = Mapping[str, Any]
Table = tuple[list[str], list[list[str]], list[str]]  # heads, rows, remarks
ACCURACY = ["network, data", "how", "top-1 of float", "top-1, packed", "bit operations of float", "file"]
LATENCY = ["network", "8/8", "4/4", "4/4, pruned", "OpenVINO int8", "ONNX Runtime int8"]
SPEEDS = ["4/4 over the faster engine", "at batch 16"]
# Row of `lbs reproduce`, its budget, and the ranges of its weights (None: made before they could be chosen): those with
# three seeds.
SEARCHED = (
    ("ResNet-20, CIFAR-100", "cifar100-resnet20", 674_643_968, None),
    ("ResNet-56, CIFAR-100", "cifar100-resnet56", 1_918_800_000, "layer"),
)
QUANTIZED = (("MobileNetV2, ImageNet", "mobilenet_v2", [8, 8]), ("MobileNetV2, ImageNet", "mobilenet_v2", [4, 8]))
NETWORKS = {
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenet_v2",
    "ResNet-20 (CIFAR)": "cifar_resnet20",
}
ENGINES = ("OpenVINO int8", "ONNX Runtime int8")


def accuracy(bodies: Mapping[str, Body]) -> Table:
    """Two searched networks and one that was not trained, of whichever are among the result files."""
    rows = []
    for title, row, budget, ranges in SEARCHED:
        group = [body for body in bodies.values() if _is(body, row, budget, ranges)]
        if group:
            rows.append([title, f"searched, fine-tuned: {_epochs(group)}, {len(group)} seeds", *_searched(group)])
    few: list[str] = []
    for title, model, bits in QUANTIZED:
        for body in (body for body in bodies.values() if body["level"] == "quantization"):
            found = [row for row in body["rows"] if body["header"]["model"] == model and row["bits"] == bits]
            found = [row for row in found if not row["zeros"]]
            if found:
                rows.append([title, _way(found[-1]), *_quantized(found[-1])])
                few.append(_few(title, found[-1]["float_top1"] / 100, body["header"]["test"]))
    told = "".join(f"; {images}" for images in dict.fromkeys(few))
    return ACCURACY, rows, [f"Top-1 in percent on all test images, of several seeds the mean [lowest highest]{told}."]


def _few(title: str, share: float, images: int) -> str:
    """How sure a share of so many images is: the standard error of a binomial."""
    return f"{title}: {images} validation images, so ±{100 * (share * (1 - share) / images) ** 0.5:.1f}"


def _is(body: Body, row: str, budget: float, ranges: str | None) -> bool:
    """A record of that row at that budget (which may be given in rounded millions)."""
    if body["level"] != "search" or body.get("row") != row:
        return False
    found = (body["config"].get("search") or {}).get("ranges")
    return bool(abs((body["target_bops"] or 0) - budget) < 1e6) and found == ranges


def _epochs(group: list[Body]) -> str:
    return group[0]["schedule"].split(" of ")[0] + " epochs"


def _searched(group: list[Body]) -> list[str]:
    top1 = [body["packed_top1"] for body in group]
    share, size = (mean(body[key] for body in group) for key in ("bops", "bytes"))
    share /= group[0]["full_precision_bops"]
    spread = f"{mean(top1):.2f} [{min(top1):.2f} {max(top1):.2f}]"
    return [f"{group[0]['float_top1']:.2f}", spread, f"{share:.2%}", f"{size / 1e6:.2f} MB"]


def _way(row: Body) -> str:
    rounding = ", optimized rounding" if row["rounding"] == "optimized" else ""
    return "`lbs.quantize`, {}/{} bits".format(*row["bits"]) + rounding


def _quantized(row: Body) -> list[str]:
    share = row["bops"] / row["full_precision_bops"]
    return [f"{row['float_top1']:.2f}", f"{row['top1']:.2f}", f"{share:.2%}", f"{row['bytes'] / 1e6:.2f} MB"]


def latency(bodies: Mapping[str, Body]) -> Table:
    """Milliseconds of one image on one thread; speeds at batch 1 and 16, above 1 where ours is faster.

    Of several machines the one measured last.
    """
    heads, rows = [*LATENCY, *SPEEDS], []
    named = [path for path, body in bodies.items() if body["level"] == "networks" and "engines" in body["header"]]
    if not named:
        return heads, rows, []
    path = max(named, key=lambda path: str(bodies[path]["header"].get("date", "")))
    head = bodies[path]["header"]
    threads = [row for row in bodies[path]["rows"] if row["threads"] == 1]
    timed = {(row["network"], row["batch"], row["contender"]): row for row in threads}
    for title, network in NETWORKS.items():
        if (network, 1, "w4a4") in timed:
            shown = [timed[network, 1, name]["median"] for name in ("w8a8", "w4a4", "w4a4 pruned", *ENGINES)]
            speeds = [_speed(timed, network, batch) for batch in (1, 16)]
            rows.append([title, *(f"{seconds * 1e3:.3f}" for seconds in shown), *speeds])
    engines = ", ".join(f"{name} {release}" for name, release in head["engines"].items())
    remark = (
        f"Milliseconds an image, batch 1, one thread of {head['device']}, {_day(head)}, {engines}; weights are random; "
        f"pruned: without 30 % of the filters. Command: `python benchmarks/bench_networks.py --save` (`{path}`)."
    )
    return heads, rows, [remark]


def _speed(timed: Mapping[tuple[str, int, str], Body], network: str, batch: int) -> str:
    if (network, batch, "w4a4") not in timed:
        return ""
    faster = min(ENGINES, key=lambda name: timed[network, batch, name]["median"])
    return f"{timed[network, batch, 'w4a4']['ratios'][faster]:.2f}x"


def _day(head: Mapping[str, Any]) -> str:
    """When it was measured; files of older benchmarks say by which commit."""
    return str(head.get("date") or f"commit {head['commit'][:7]}")
