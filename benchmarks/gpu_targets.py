"""The targets of the GPU kernels as rows {target, needed, measured, met}, from the result files alone.

`met` is None where something was not measured; `detail` says what the number is made of, or what is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_search import NETWORKS

Results = dict[str, dict[str, Any]]  # part -> its result file
Row = dict[str, Any]
HALF = "float16"
RESNET, BATCHES = ("resnet18", "resnet50"), (128, 256)
COMPILED = "torch float16 compiled"
ONE_BIT = 1.3


def rows(results: Results, resnet_layers: Iterable[str] = ()) -> list[Row]:
    """Every target. resnet_layers: problems of ResNet-18/50, of any batch and bits, as they print themselves."""
    layers = results.get("layers", {}).get("rows", [])
    wanted = {_place(name) for name in resnet_layers}
    return [
        _row("b1 / INT8 tensor-core rate is measured", None, results.get("roofs", {}).get("b1_over_int8")),
        _one_bit(layers),
        *[_layer_mean(layers, wanted, bits, needed) for bits, needed in (("w4a4", 2.0), ("w8a8", 1.4), ("w2a2", 3.0))],
        *_models(results.get("models", {})),
        *_search(results.get("search", {}).get("networks", {})),
        _tests(results.get("tests", {})),
        *[_sanitizer(results.get("sanitizer", {}), tool) for tool in ("memcheck", "racecheck")],
    ]


def table(found: list[Row]) -> str:
    """The rows as lines for people."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = [
        f"{words[row['met']]:>12}  {row['target']}: {_number(row['measured'])}"
        + (f" (needed {_number(row['needed'])})" if row["needed"] is not None else "")
        + (f"; {row['detail']}" if row["detail"] else "")
        for row in found
    ]
    return "\n".join(lines)


def _row(target: str, needed: float | None, measured: Any, detail: str = "", at_most: bool = False) -> Row:
    met = None
    if measured is not None:
        met = True if needed is None else (measured <= needed if at_most else measured >= needed)
    return {"target": target, "needed": needed, "measured": measured, "met": met, "detail": detail}


def _best(layers: list[Row], family: str) -> dict[str, float]:
    """Fastest median of a family of kernels by problem."""
    found: dict[str, float] = {}
    for row in layers:
        if "median_s" in row and row["contender"].split(":")[0] == family:
            found[row["problem"]] = min(row["median_s"], found.get(row["problem"], math.inf))
    return found


def _one_bit(layers: list[Row]) -> Row:
    """K2 over K1 at w2a2 on 3x3 layers of 128 channels or more at batch 32 and up, or K2 chosen on none of them."""
    triton, cuda = _best(layers, "triton"), _best(layers, "cuda")
    ratios = {}
    for problem in triton.keys() & cuda.keys():
        match = re.match(r"bitconv2d_n(\d+)_(\d+)x.*_k3x3_.*_w2a2_", problem)
        if match and int(match[1]) >= 32 and int(match[2]) >= 128 and "_g" not in problem:
            ratios[problem] = triton[problem] / cuda[problem]
    label = "one-bit kernel over the Triton one, w2a2, 3x3, C >= 128, batch >= 32; or it is chosen nowhere there"
    if not ratios:
        return _row(label, ONE_BIT, None, "no layer was timed with both")
    row = _row(label, ONE_BIT, _mean(ratios.values()))
    chosen = sum(ratio > 1 for ratio in ratios.values())  # the choice is the fastest by the times of these rows
    held = "the first holds" if row["met"] else "neither holds" if chosen else "the second holds"
    detail = f"{held}: it is chosen for {chosen} of {len(ratios)} layers"
    return {**row, "met": row["met"] or not chosen, "detail": detail}


def _layer_mean(layers: list[Row], wanted: set[str], bits: str, needed: float) -> Row:
    """Geometric mean over ResNet-18/50 layer shapes at batch 128 of the fastest kernel over float16."""
    halves = {row["problem"]: row["median_s"] for row in layers if row["contender"] == HALF and "median_s" in row}
    ratios = []
    for problem, half in halves.items():
        if "_n128_" not in problem or f"_{bits}_" not in problem or _place(problem) not in wanted:
            continue
        ours = [best[problem] for best in (_best(layers, "triton"), _best(layers, "cuda")) if problem in best]
        if ours:
            ratios.append(half / min(ours))
    detail = f"{len(ratios)} of {len(wanted)} layer shapes (first and last layers have 8 bits)"
    return _row(
        f"{bits} over cuDNN float16 channels_last, ResNet-18/50 layers, batch 128", needed, _mean(ratios), detail
    )


def _models(body: Row) -> list[Row]:
    found = body.get("rows", [])
    at = {(row["network"], row["batch"], row["contender"]): row for row in found}
    missing, modes = body.get("missing", {}), body.get("compiled", {})

    def why(network: str, batch: int, *contenders: str) -> str:
        """Why a network has no such row."""
        place = f"{network} {batch}"
        reasons = [f"{name}: {missing[place][name]}" for name in contenders if name in missing.get(place, {})]
        return "; ".join(reasons) if place in missing else f"{place} was not timed ({body.get('ended', 'not run')})"

    def row(label: str, needed: float, network: str, batch: int, ours: str, other: str) -> Row:
        ratio = at.get((network, batch, ours), {}).get("ratios", {}).get(other)
        detail = f"torch.compile: {modes.get(f'{network} {batch}')}" if other == COMPILED else ""
        detail = why(network, batch, ours, other) if ratio is None else detail
        return _row(f"{label}, batch {batch}", needed, ratio, detail)

    places = [(network, batch) for batch in BATCHES for network in RESNET]
    result = [
        row(f"{network} w4a4 over float32 (TF32 off)", 15.0, network, batch, "w4a4", "torch float32")
        for network, batch in places
    ]
    for network, batch in places:
        for ours, needed in (("w8a8", 1.4), ("w4a4", 1.8), ("w4a4 pruned", 2.5)):
            result.append(row(f"{network} {ours} over compiled float16", needed, network, batch, ours, COMPILED))
    rate = at.get(("resnet50", 256, "mixed"), {}).get("images_per_s")
    detail = why("resnet50", 256, "mixed") if rate is None else ""
    result.append(_row("resnet50 images/s, batch 256, mixed plan (TensorRT INT8: 94,620)", 94_620.0, rate, detail))
    for network, needed in (("resnet18", 60e-6), ("resnet50", 150e-6)):
        times = {row["contender"]: row["median"] for row in found if (row["network"], row["batch"]) == (network, 1)}
        packed = {name: seconds for name, seconds in times.items() if not name.startswith("torch")}
        best = min(packed, key=lambda name: packed[name]) if packed else None
        detail = best or why(network, 1, *missing.get(f"{network} 1", {}))
        label = f"{network} seconds, batch 1"
        result.append(_row(label, needed, packed[best] if best else None, detail, at_most=True))
    return result


def _search(networks: Row) -> list[Row]:
    """A step of the search against float training, and separate branches against it."""
    result = []
    for network, batch in NETWORKS.items():
        body = networks.get(network, {"rows": [], "ended": "not run"})
        at = {row["contender"]: row for row in body["rows"]}
        ours, branches = at.get("search", {}), at.get("multi-path", {})
        step, detail = f"{network}, batch {batch}: a search step", "" if ours else body["ended"]
        for label, key, most in (("time", "slower_than_float", 1.6), ("memory", "memory_over_float", 1.5)):
            result.append(_row(f"{step} over float, {label}", most, ours.get(key), detail, at_most=True))
        ratio = branches["median"] / ours["median"] if ours else None
        result.append(_row(f"{network}, batch {batch}: separate branches over shared bits, time", 2.5, ratio, detail))
    return result


def _tests(body: Row) -> Row:
    counts = ", ".join(f"{body[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in body)
    left_out = f"; left out: {body['left_out']}" if "left_out" in body else ""
    detail = (counts or str(body.get("reason", ""))) + left_out
    row = _row("every gpu test is green", None, body.get("tests"), detail)
    return {**row, "met": body.get("passed") if body else None}


def _sanitizer(body: Row, tool: str) -> Row:
    found = body.get("tools", {}).get(tool, {})
    errors = found.get("errors")
    return _row(f"compute-sanitizer {tool} errors", 0, errors, found.get("reason", ""), at_most=True)


def _mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _place(problem: str) -> str:
    """A problem without batch, bits and device."""
    return re.sub(r"_w\d+a\d+_[a-z0-9:]+$", "", re.sub(r"_n\d+_", "_", problem))


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"
