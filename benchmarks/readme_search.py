"""The tables of searched networks, from records of `lbs reproduce --record` and files of bench_milliseconds.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from lbs.reporting.asked import asked_of
from lbs.reporting.records import Record

Body = dict[str, Any]
HEADS = [
    "row",
    "schedule (epochs of search + fine-tuning)",
    "learning rate, distillation; filters pruned",
    "seeds",
    "top-1, last epoch",
    "best epoch",
    "packed",
    "equal predictions",
    "BOPs",
    "bits (weights/activations)",
    "layers pruned",
    "published",
]
LEGEND = (
    "Searched and fine-tuned with `lbs reproduce` (a row is its command). Top-1 in percent on all test images, mean "
    "[lowest highest] where there are several seeds. The weights of the last epoch are the ones packed; the best epoch "
    "is picked on the test images, as published figures probably are. Rows that name ranges are of code "
    "that knows ranges per filter; the others are of code before it, whose layers had one each."
)


def search_tables(records: dict[str, Body]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows under `HEADS` for each network: one row for all runs that differ in nothing but the seed."""
    groups: dict[tuple[Any, ...], list[Body]] = {}
    for _, body in sorted(records.items()):
        budget = body["target_bops"] or 0
        asked = asked_of(Record(body["row"], config=body["config"]))
        key = (body["network"], body["float_top1"], budget, body["row"], asked, _ranges(body))
        groups.setdefault(key, []).append(body)
    tables = []
    for network, float_top1 in sorted({key[:2] for key in groups}):
        own = [(key, group) for key, group in groups.items() if key[:2] == (network, float_top1)]
        own.sort(key=lambda found: (found[0][2:4], found[1][0]["schedule"], _recipe(found[1][0])))
        rows = [_row(group) for _, group in own]
        tables.append((f"**{network}**, float {float_top1:.2f} % (`benchmarks/results/search/`)", rows))
    return tables


def _row(group: list[Body]) -> list[str]:
    first = group[0]
    published = first["published"]
    return [
        first["row"],
        " or ".join(dict.fromkeys(body["schedule"] for body in group)),
        _recipe(first),
        ", ".join(str(seed) for seed in sorted(body["seeds"]["finetune"] for body in group)),
        _spread([body["fine_tuned_top1"] for body in group]),
        _spread([body["best_epoch_top1"] for body in group]),
        _spread([body["packed_top1"] for body in group if body["packed_top1"] is not None]) or "in float",
        _counts(group),
        _cost(group),
        " or ".join(dict.fromkeys(", ".join(f"{w}/{a}" for w, a in body["bits"]) for body in group)),
        ", ".join(dict.fromkeys(str(len(body["pruned_layers"])) for body in group)),
        f"{published['top1']:.1f} at {published['bops'] / 1e6:.1f}M" if published else "",
    ]


def _recipe(body: Body) -> str:
    """What one chooses beside the schedule."""
    tuned, search = body["config"]["finetune"], body["config"].get("search")
    text = f"{tuned['lr']:g}, {tuned['distill']:g}"
    text += f", decay {tuned['weight_decay']:g}" if tuned["weight_decay"] != 1e-4 else ""
    text += f", average {tuned['ema']:g}" if tuned.get("ema") else ""
    text += f", ranges per {_ranges(body)}" if _ranges(body) else ""
    searched = search and search["pruning"] and search["mode"] not in ("quantization-only", "greedy")
    if not searched:
        return text
    return f"{text}; {search['prune_lr']:g} by {search['importance']}, up to {search['max_pruning_ratio']:.0%}"


def _ranges(body: Body) -> str:
    """What has a range of its own; "" where the release that made the record had no choice (and was other code)."""
    return str((body["config"].get("search") or {}).get("ranges", ""))


def _spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    middle, low, high = (f"{value:.{digits}f}" for value in (mean(values), min(values), max(values)))
    return f"{middle} [{low} {high}]" if len(values) > 1 else middle


def _counts(group: list[Body]) -> str:
    least = min((body for body in group if body["equal_predictions"] is not None), key=_equal, default=None)
    return "" if least is None else f"{least['equal_predictions']:,} of {least['images']:,}"


def _equal(body: Body) -> int:
    return int(body["equal_predictions"])


def _cost(group: list[Body]) -> str:
    costs = sorted({round(body["bops"] / 1e6, 1) for body in group})
    measured = " to ".join(f"{cost}M" for cost in dict.fromkeys((costs[0], costs[-1])))
    target = group[0]["target_bops"]
    return f"{measured} of {target / 1e6:.1f}M" if target else measured


def milliseconds_rows(body: Body) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of networks searched under milliseconds beside the others, the seeds of each together."""
    rows = body["rows"]
    batches = sorted({row["batch"] for row in rows})
    shown = []
    for contender in dict.fromkeys(row["contender"] for row in rows):
        group = [row for row in rows if row["contender"] == contender]
        once = [row for row in group if row["batch"] == batches[0]]
        asked = once[0]["asked"]
        shown.append(
            [
                contender,
                ", ".join(str(row["seed"]) for row in once),
                _spread([row["top1"] for row in once]),
                "" if asked is None else f"{1e6 * asked:.1f}",
                *(_microseconds([row for row in group if row["batch"] == batch]) for batch in batches),
                " or ".join(dict.fromkeys(", ".join(f"{w}/{a}" for w, a in row["bits"]) for row in once)),
                ", ".join(dict.fromkeys(str(len(row["pruned_layers"])) for row in once)),
                f"{mean(row['bytes'] for row in once) / 1e6:.2f}",
            ]
        )
    times = [f"us an image, batch {batch}" for batch in batches]
    return ["network", "seeds", "top-1", "us asked", *times, "bits", "layers pruned", "MB"], shown


def _microseconds(group: list[Body]) -> str:
    return _spread([1e6 * row["median"] / row["batch"] for row in group], digits=1)
