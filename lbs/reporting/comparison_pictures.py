"""What a comparison shows: for each network accuracy against what it costs, and which runs are not in a picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from lbs.reporting import pareto
from lbs.reporting.gathered import Line
from lbs.reporting.published import Mark, marks_of
from lbs.reporting.records import Record
from lbs.reporting.units import bops, size


@dataclass(frozen=True)
class _Cost:
    """Something a network costs: how a picture of it is called, its number in a line, and why a line has none."""

    stem: str
    caption: str
    label: str
    told: Callable[[float], str]
    of: Callable[[Line], float | None]
    without: Callable[[Line], str]


def draw(lines: list[Line], found: list[Record]) -> tuple[dict[str, tuple[str, Figure]], dict[str, str]]:
    """File stem -> (caption, figure), and file stem -> which runs are not in it.

    For each network accuracy against bit operations, bytes and time, then the fine-tuning curves.
    """
    pictures: dict[str, tuple[str, Figure]] = {}
    notes: dict[str, str] = {}
    for network in dict.fromkeys(line.network for line in lines):
        own, slug = [line for line in lines if line.network == network], re.sub(r"[^\w.-]", "_", network)
        for cost in _costs(own):
            points = [
                pareto.Point(line.name, amount, 100 * line.accuracy)
                for line in own
                if (amount := cost.of(line)) and line.accuracy is not None
            ]
            if not points:
                continue
            marks = {m: i for i, m in enumerate(marks_of(network))} if cost.stem == "pareto" else {}
            for stem, caption, some in _views(cost, points, marks):
                figure = pareto.accuracy_over_cost(points, some, cost.label, cost.told)
                pictures[f"{stem}-{slug}"] = (f"{network}: {caption}", figure)
                notes[f"{stem}-{slug}"] = _not_shown(own, cost)
    curves = pareto.curves({record.name: record.epochs("finetune") for record in found})
    if curves is not None:
        pictures["curves"] = ("Fine-tuning: test accuracy by epoch", curves)
        without = [record.name for record in found if not record.epochs("finetune")]
        notes["curves"] = f"Not shown: {', '.join(without)} (not fine-tuned)." if without else ""
    return pictures, notes


def _views(cost: _Cost, points: list[pareto.Point], marks: dict[Mark, int]) -> list[tuple[str, str, dict[Mark, int]]]:
    near = pareto.crowd(points, marks)
    views = [(cost.stem, cost.caption, marks)]
    return [*views, ("near", f"{cost.caption}, near these runs", near)] if near and near != marks else views


def in_no_picture(lines: list[Line]) -> list[tuple[str, str]]:
    """Runs, each with the reason, of networks of which there is no picture of accuracy at all."""
    found = []
    for network in dict.fromkeys(line.network for line in lines):
        own = [line for line in lines if line.network == network]
        costs = _costs(own)
        if not any(line.accuracy is not None and cost.of(line) for line in own for cost in costs):
            reasons = {line.name: ", ".join(cost.without(line) for cost in costs if not cost.of(line)) for line in own}
            none = "no accuracy was measured"
            found += [(x.name, f"in no picture: {none if x.accuracy is None else reasons[x.name]}") for x in own]
    return found


def _not_shown(lines: list[Line], cost: _Cost) -> str:
    reasons = {
        line.name: "no accuracy was measured" if line.accuracy is None else cost.without(line)
        for line in lines
        if line.accuracy is None or not cost.of(line)
    }
    told = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return f"Not shown: {told}." if told else ""


def _costs(lines: list[Line]) -> tuple[_Cost, ...]:
    """What pictures show; times of one machine only, the one that timed most of these runs."""
    batch = min((at for line in lines for at in line.times), default=1)
    machines = Counter(line.timed_on for line in lines if batch in line.times)
    machine = machines.most_common(1)[0][0] if machines else ""

    def took(line: Line) -> float | None:
        return line.times.get(batch) if line.timed_on == machine else None

    def untimed(line: Line) -> str:
        return f"timed on {line.timed_on}" if batch in line.times else f"not timed at batch {batch}: lbs bench"

    operations, time = "bit operations per image", f"ms of a call, batch {batch}"
    return (
        _Cost("pareto", "accuracy and bit operations", operations, bops, lambda line: line.bops, lambda _: "no plan"),
        _Cost(
            "size",
            "accuracy and size",
            "size of the packed file",
            size,
            lambda line: line.bytes,
            lambda _: "not packed",
        ),
        _Cost("time", "accuracy and time", time, lambda value: f"{1e3 * value:.3g}", took, untimed),
    )
