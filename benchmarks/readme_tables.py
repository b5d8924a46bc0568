"""Writes what is measured into README.md and docs/results.md, between their markers, from result files alone.

    python benchmarks/readme_tables.py            rewrite both
    python benchmarks/readme_tables.py --check    exit 1 where a page does not say what the files say

Read are benchmarks/results/<device>/*.json, level `model` as `lbs bench --json` prints it, `quickstart` as `lbs
quickstart --json`, `op` as bench_<op>.py, `networks` as bench_networks.py, `training` as bench_search.py,
`quantization` as bench_quantize.py, `milliseconds` as bench_milliseconds.py, `robustness` as bench_robustness.py and
`gpu_...` as gpu_suite.py save them, and benchmarks/results/search/*.json, the records of searched networks: one table
for all that `lbs reproduce` made. Files of other kinds are listed by name.

A new kind of file is a function in `TABLES`; a new section of docs/results.md is a line of `SECTIONS` and its two
markers in the page, under a heading and the words that say how it was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script from anywhere
    sys.path.insert(0, str(ROOT))

from benchmarks.readme_face import accuracy, latency  # noqa: E402  the path above comes first
from benchmarks.readme_networks import network_parts  # noqa: E402
from benchmarks.readme_search import HEADS, LEGEND, milliseconds_rows, search_tables  # noqa: E402

Body = dict[str, Any]


def network_table(path: str, body: Body) -> list[str]:
    """A searched network: accuracy, cost, size."""
    pruned, in_float = body.get("pruned_layers") or {}, body.get("in_float", False)
    rows = [
        ("top-1, fine-tuned, in torch", f"{body['fine_tuned_top1']:.2f} %"),
        ("top-1, packed", "" if in_float else f"{body['packed_top1']:.2f} %"),
        ("equal predictions", "" if in_float else f"{body['equal_predictions']:,} of {body['images']:,} test images"),
        ("bit operations", f"{body['bops'] / 1e6:.1f}M of {body['full_precision_bops'] / 1e6:.1f}M"),
        ("(weight, activation) bits", ", ".join(f"{w}/{a}" for w, a in body["bits"])),
        ("layers with pruned filters", str(len(pruned))),
        ("file", "" if in_float else f"{body['bytes']:,} bytes"),
        ("training", f"{body['schedule']}; the {body['epoch']} epoch is reported"),
    ]
    made = "pruned, in float" if in_float else "searched and packed"
    known = [row for row in rows if row[1]]  # a network that stays in float has no codes to pack
    return [f"**{Path(path).stem}**, {made} (`{path}`)", "", *_table(["", "measured"], known)]


def training_table(path: str, body: Body) -> list[str]:
    """What a step of the search costs: one row per contender."""
    rows = []
    for row in body["rows"]:
        times = f"{row['median'] * 1e3:.1f} [{row['p20'] * 1e3:.1f} {row['p80'] * 1e3:.1f}]"
        memory = ("", "")
        if row["peak_bytes"] is not None:
            memory = (f"{row['peak_bytes'] / 1e6:.0f}", f"{row['memory_over_float']:.2f}x")
        rows.append((row["contender"], times, f"{row['slower_than_float']:.2f}x", *memory))
    head = body["header"]
    name = f"{head['model']}, batch {head['batch']}, amp {head['amp']}"
    title = f"**Training steps of {name}**, {head['threads']} threads, torch {head['torch']} (`{path}`)"
    heads = ["contender", "ms per step, median [p20 p80]", "of float", "peak MB", "of float"]
    return [title, "", *_table(heads, rows)]


def milliseconds_table(path: str, body: Body) -> list[str]:
    """Networks searched under milliseconds beside those one would take without."""
    head = body["header"]
    title = f"**{head['row']}**, float {body['rows'][0]['float_top1']:.2f} %, {head['device']} (`{path}`)"
    told = f"All that are trained: `{head['options']}`."
    refused = [f"Refused or not trained: {'; '.join(body['missing'])}."] if body["missing"] else []
    return [title, "", *_table(*milliseconds_rows(body)), "", told, *refused]


def quantization_table(path: str, body: Body) -> list[str]:
    """What is left of a network's accuracy without training: one row for each way of choosing its codes."""
    head, rows = body["header"], []
    for row in body["rows"]:
        share = row["bops"] / row["full_precision_bops"]
        if row.get("latency"):
            widths = f"{row['faster_asked']:g}x of 8/8 asked, {row['latency']['faster']:.2f}x measured"
            widths += f", {len(row['kept'])} layers pruned, {row['distill']} epochs of distillation"
        elif row["bits"] is None:
            widths = f"at most {row['bops_asked']:.1%} of the BOPs"
        else:
            widths = "{}/{}".format(*row["bits"])
        asked = widths + (f", {row['zeros']:.0%} of the weights 0" if row["zeros"] else "")
        top1 = f"{row['top1']:.2f} of {row['float_top1']:.2f}"
        cost = (f"{share:.2%}", f"{row['bytes'] / 1e6:.2f}", f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}")
        rows.append((asked, row["rounding"], top1, *cost))
    title = (
        f"**{head['model']} without training**, calibrated on {head['calibration']} images, tested on "
        f"{head['test']:,} others; {head['threads']} threads, torch {head['torch']} (`{path}`)"
    )
    heads = [
        "bits (weights/activations)",
        "rounding",
        "top-1, of float",
        "BOPs of float",
        "MB",
        "processor seconds",
        "peak MB",
    ]
    return [title, "", *_table(heads, rows)]


def model_table(path: str, body: Body) -> list[str]:
    """Whole networks: one row per batch and contender."""
    rows = []
    for row in body["rows"]:
        times = f"{row['median'] * 1e3:.3f} [{row['p20'] * 1e3:.3f} {row['p80'] * 1e3:.3f}]"
        ratio = ", ".join(f"{value:.2f}x {name}" for name, value in row["ratios"].items())
        rows.append((str(row["batch"]), row["contender"], times, ratio if row["contender"] == "packed" else ""))
    network = Path(path).stem.removeprefix("model_")
    title = f"**{network}** on {body['device']}, {body['threads']} threads, torch {body['header']['torch']} (`{path}`)"
    lines = [title, "", *_table(["batch", "contender", "ms per batch, median [p20 p80]", "speed of packed over"], rows)]
    return [*lines, *_remarks(body)]


def quickstart_table(path: str, body: Body) -> list[str]:
    """The last lines of `lbs quickstart`, as it printed them, but for where the page is."""
    bench = body["bench"]
    title = (
        f"**The end of `make quickstart`** on {bench['device']}, {bench['threads']} threads, torch "
        f"{bench['header']['torch']} (`{path}`, of `lbs quickstart --json`)"
    )
    return [title, "", "```", *body["summary"], "```", *_remarks(bench)]


def networks_table(path: str, body: Body) -> list[str]:
    """Networks against the engines."""
    lines = [f"**Networks against int8 engines** on {body['header']['device']} (`{path}`)"]
    for heads, rows in network_parts(body):
        lines += ["", *_table(heads, rows)]
    return [*lines, *_remarks(body)]


def op_table(path: str, body: Body) -> list[str]:
    """One operation: geometric means over all layers, and over how many."""
    header = body["header"]
    baselines = sorted({name for means in body["geomean"].values() for name in means})
    rows = [
        (contender, *(f"{means[name]:.2f}x" if name in means else "" for name in baselines))
        for contender, means in body["geomean"].items()
    ]
    problems = len({row["problem"] for row in body["rows"]})
    title = (
        f"**{body['op']}**, geometric mean over {problems} layers and bit widths, {header['device']}, batch "
        f"{header['batch']}, {header['threads']} threads, torch {header['torch']} (`{path}`)"
    )
    return [title, "", *_table(["speed of", *(f"over {name}" for name in baselines)], rows), *_remarks(body)]


def targets_table(path: str, body: Body) -> list[str]:
    """What the GPU kernels were to reach, and what they did."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = [
        (row["target"], _figure(row["needed"]), _figure(row["measured"]), words[row["met"]], row["detail"])
        for row in body["rows"]
    ]
    heads = ["target", "needed", "measured", "", "made of"]
    return [f"**Targets** on {_machine(body)} (`{path}`)", "", *_table(heads, rows)]


def gpu_roofs_table(path: str, body: Body) -> list[str]:
    """The roofs of a GPU."""
    rows = []
    for name, row in body["rows"].items():
        rate = (
            f"{row['bytes_per_s'] / 1e12:.2f} TB/s"
            if "bytes_per_s" in row
            else f"{row['operations_per_s'] / 1e12:.0f} TOP/s"
        )
        rows.append((name, rate))
    if body["b1_over_int8"] is not None:
        rows.append(("b1 / int8", f"{body['b1_over_int8']:.2f}"))
    return [f"**Roofs** of {_machine(body)} (`{path}`)", "", *_table(["", "measured"], rows), *_remarks(body)]


def gpu_layers_table(path: str, body: Body) -> list[str]:
    """Geometric mean of the fastest kernel of each problem over float16, by bits and batch."""
    times: dict[str, dict[str, float]] = {}
    for row in body["rows"]:
        if "median_s" in row:
            times.setdefault(row["problem"], {})[row["contender"]] = row["median_s"]
    logs: dict[tuple[str, int], list[float]] = {}
    for problem, found in times.items():
        bits, batch = re.search(r"_(w\d+a\d+)_", problem), re.search(r"_n(\d+)_", problem)
        kernels = [seconds for name, seconds in found.items() if name.startswith(("triton:", "cuda:"))]
        if bits and batch and kernels and "float16" in found:
            logs.setdefault((bits[1], int(batch[1])), []).append(math.log(found["float16"] / min(kernels)))
    rows = [
        (bits, str(batch), str(len(values)), f"{math.exp(sum(values) / len(values)):.2f}x")
        for (bits, batch), values in sorted(logs.items())
    ]
    title = f"**Layers** on {_machine(body)}, L2 {body['l2']}, against float16 channels_last (`{path}`)"
    return [title, "", *_table(["bits", "batch", "layer shapes", "speed over float16, geometric mean"], rows)]


def gpu_models_table(path: str, body: Body) -> list[str]:
    """Whole networks on a GPU, in CUDA graphs."""
    rows = []
    for row in body["rows"]:
        ratios = ", ".join(f"{value:.2f}x {name}" for name, value in row["ratios"].items() if name.startswith("torch"))
        ours = not row["contender"].startswith("torch")
        times = f"{row['median'] * 1e3:.3f} [{row['p20'] * 1e3:.3f} {row['p80'] * 1e3:.3f}]"
        cells = (row["network"], str(row["batch"]), row["contender"], times, f"{row['images_per_s']:,.0f}")
        rows.append((*cells, ratios if ours else ""))
    heads = ["network", "batch", "contender", "ms per batch, median [p20 p80]", "images/s", "speed over"]
    lines = [f"**Networks** on {_machine(body)}, CUDA graphs (`{path}`)", "", *_table(heads, rows)]
    for pair, reasons in body["missing"].items():
        lines += _remarks({"missing": {f"{name} ({pair})": reason for name, reason in reasons.items()}})
    return lines


def _machine(body: Body) -> str:
    header = body["header"]
    return f"{header['device']}, torch {header['torch']}, Triton {header['triton']}"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1e4 or isinstance(value, int) else f"{value:.3g}"


OP_LEGEND = (
    "Single operations: `packed` is the step inside one native call, as it runs in a network; `packed call` is that "
    "call on its own, with the conversion of its image and results. Below 1 is slower."
)


RUN = ("loaded and run", "valid, run by both")  # verdicts on files and programs that ran


def robustness_table(path: str, body: Body) -> list[str]:
    """Mutants and what became of them, memory after many networks, one image beside a large batch."""
    names = {"crash": "crashes", "hang": "hangs", "foreign": "foreign exceptions"}
    names["disagreement"] = "programs that Python and C++ judge or compute otherwise"
    kinds, memory, beside = body["kinds"], body["memory"], body["beside"]
    rows = [("mutants", "", *(f"{found['done']:,}" for found in kinds.values()))]
    ran = (sum(found["verdicts"].get(name, 0) for name in RUN) for found in kinds.values())
    rows.append(("of these valid, and run", "", *(f"{count:,}" for count in ran)))
    rows += [
        (name, "0", *(str(found["failed"].get(key, 0)) for found in kinds.values())) for key, name in names.items()
    ]
    worst = (f"{found['seconds_per_mb']:.2f}" for found in kinds.values())
    rows.append(("worst seconds of the processor, per megabyte begun", "1", *worst))
    peaks = (f"{found['peak_bytes'] / 1e6:.0f}" for found in kinds.values())
    rows.append(("peak memory of a process, MB", "1000", *peaks))
    head, ratio = body["header"], beside["beside_s"] / beside["alone_s"]
    grown = f"memory after {memory['networks']} networks in turn, MB"
    waits = f"median of batch 1 beside batch {beside['batch']}, of its time alone"
    others = [(grown, "50", f"{memory['grown_bytes'] / 1e6:.1f}"), (waits, "3", f"{ratio:.2f}")]
    title = f"**Robustness** on {head['device']}, torch {head['torch']}, seed {body['seed']} (`{path}`)"
    lines = [title, "", *_table(["", "at most", *kinds], rows), "", *_table(["", "at most", "measured"], others)]
    return [*lines, *_remarks(body)]


# Level of a file, or its folder where it states none, in the order of the page.
TABLES: dict[str, Callable[[str, Body], list[str]]] = {
    "quickstart": quickstart_table,
    "search": network_table,
    "milliseconds": milliseconds_table,
    "quantization": quantization_table,
    "networks": networks_table,
    "model": model_table,
    "op": op_table,
    "training": training_table,
    "robustness": robustness_table,
    "gpu_targets": targets_table,
    "gpu_models": gpu_models_table,
    "gpu_layers": gpu_layers_table,
    "gpu_roofs": gpu_roofs_table,
}


# Section of docs/results.md -> levels of the files it shows; files of no level are named under `others`.
SECTIONS: dict[str, tuple[str, ...]] = {
    "quickstart": ("quickstart",),
    "searched": ("search",),
    "milliseconds": ("milliseconds",),
    "quantized": ("quantization",),
    "networks": ("networks",),
    "bench": ("model",),
    "operations": ("op",),
    "training": ("training",),
    "robustness": ("robustness",),
    "gpu": ("gpu_targets", "gpu_models", "gpu_layers", "gpu_roofs"),
    "others": (),
}
PAGES: dict[str, tuple[str, ...]] = {"README.md": ("accuracy", "latency"), "docs/results.md": tuple(SECTIONS)}


def measured(root: Path = ROOT) -> dict[str, str]:
    """What stands between the markers of each section, README's too."""
    found: dict[str, list[list[str]]] = {level: [] for level in TABLES}
    others: list[str] = []
    bodies: dict[str, Body] = {}
    for file in sorted((root / "benchmarks" / "results").glob("*/*.json")):
        body, path = json.loads(file.read_text()), file.relative_to(root).as_posix()
        body["level"] = level = body.get("level", file.parent.name)
        bodies[path] = body
        if level not in TABLES:
            others.append(f"`{path}`")
        elif level != "search" or "row" not in body:
            found[level].append(TABLES[level](path, body))
    reproduced = {path: body for path, body in bodies.items() if body["level"] == "search" and "row" in body}
    if reproduced:
        found["search"].append([LEGEND])
        found["search"] += [[title, "", *_table(HEADS, rows)] for title, rows in search_tables(reproduced)]
    if found["op"]:
        found["op"].insert(0, [OP_LEGEND])
    parts = {name: [part for level in levels for part in found[level]] for name, levels in SECTIONS.items()}
    parts["others"] = [
        [f"Without a table here: {', '.join(others)}." if others else "Every result file has its table."]
    ]
    for name, table in (("accuracy", accuracy), ("latency", latency)):
        heads, rows, remarks = table(bodies)
        parts[name] = [_table(heads, rows), *([remark] for remark in remarks)] if rows else []
    told = {name: "\n\n".join("\n".join(lines) for lines in part) for name, part in parts.items()}
    return {name: text or "No result files." for name, text in told.items()}


def rewritten(page: str, sections: dict[str, str]) -> str:
    """`page` with each section between its markers.

    Raises:
        ValueError: the markers of a section are not there exactly once, in order.
    """
    for name, text in sections.items():
        begin, end = markers(name)
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the page needs the lines {begin} and {end} once each, in this order")
        head, rest = page.split(begin)
        page = f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def markers(section: str) -> tuple[str, str]:
    """The lines between which a section is written."""
    return f"<!-- {section}:begin -->", f"<!-- {section}:end -->"


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is out of date")
    args = parser.parse_args()
    told, stale = measured(), 0
    for page, names in PAGES.items():
        before = (ROOT / page).read_text()
        after = rewritten(before, {name: told[name] for name in names})
        if before != after and args.check:
            print(f"{page} does not say what the result files say; run: python benchmarks/readme_tables.py")
            stale = 1
        elif before != after:
            (ROOT / page).write_text(after)
            print(f"wrote {ROOT / page}")
    return stale


def _remarks(body: Body) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in body.get("missing", {}).items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"Not timed: {', '.join(names)} ({reason})." for reason, names in reasons.items()]
    lines += [f"{note[:1].upper()}{note[1:]}." for note in body.get("notes", ())]
    return ["", *lines] if lines else []


def _table(heads: list[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    sys.exit(main())
