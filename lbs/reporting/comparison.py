"""`lbs report RUN RUN ...`: several runs in one table, and in one picture of accuracy against bit operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lbs.reporting import page, pareto, records
from lbs.reporting.asked import asked_of, variant
from lbs.reporting.plots import STYLE
from lbs.reporting.published import NETWORKS, marks_of
from lbs.reporting.records import Record
from lbs.reporting.tables import Table
from lbs.reporting.units import bops, percent, quantity, seconds
from lbs.run_folder import write_bytes


@dataclass(frozen=True)
class Line:
    """What one run says of itself. Accuracies in 0..1; None where a phase is missing."""

    name: str
    label: str  # the row of the results, or the run's name
    network: str
    seed: int | None
    schedule: str
    float_accuracy: float | None
    last: float | None
    best: float | None
    best_epoch: int | None
    packed: float | None
    equal: str
    targets: dict[str, dict[str, Any]]  # as Record.targets
    bops: int | None
    full: int | None
    seconds: float | None
    variant: str
    asked: str  # runs that agree in it differ by their seeds only; "": not known

    def of_targets(self, key: str) -> str:
        """One number of every target, such as `630.6M, 5.5 kB`; a dash where no target has it."""
        shown = [quantity(name, row[key], row["modelled"]) for name, row in self.targets.items()]
        return ", ".join(shown) if set(shown) - {"-"} else "-"


def line_of(record: Record) -> Line:
    """Read from the record of a reproduced row where there is one, else from the sections of results.json."""
    model, classes = str(record.network.get("model", "?")), int(record.network.get("num_classes", 0))
    images, equal = record.value("verify", "images"), record.value("verify", "equal_predictions")
    spent = [record.value(phase, "seconds") for phase in ("float", "search", "finetune")]
    return Line(
        name=record.name,
        label=record.made.get("row") or record.name,
        network=NETWORKS.get((model, classes), model),
        seed=record.seed(),
        schedule=record.made.get("schedule") or _schedule(record),
        float_accuracy=record.value("float", "accuracy"),
        last=record.value("finetune", "accuracy"),
        best=record.value("finetune", "best_accuracy"),
        best_epoch=record.value("finetune", "best_epoch"),
        packed=record.value("verify", "packed_accuracy"),
        equal=f"{equal} of {images}" if images is not None else "-",
        targets=record.targets(),
        bops=sum(row.bops for row in record.layers) or None,
        full=sum(row.full_bops for row in record.layers) or None,
        seconds=sum(x for x in spent if x is not None) or None,
        variant=record.made.get("variant") or variant(record),
        asked=asked_of(record),
    )


def _schedule(record: Record) -> str:
    epochs = [record.value(phase, "epochs") for phase in ("search", "finetune")]
    return "+".join(str(x) for x in epochs if x is not None) + " epochs" if any(epochs) else "-"


def _records(run_dirs: Sequence[str | Path]) -> list[Record]:
    """Named by their folders, with as many of the folders above as tell them apart."""
    found = [records.read(folder) for folder in run_dirs]
    parts = [Path(folder).resolve().parts for folder in run_dirs]
    depth = next((n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts))), 1)
    return [replace(record, name="/".join(own[-depth:])) for record, own in zip(found, parts, strict=True)]


def compare(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.html and the PNG files of a comparison into `out`; returns the path of the page.

    Raises:
        CheckpointError: a folder that holds no run, a damaged file, or a full disk.
    """
    found = _records(run_dirs)
    with page.odd_told(" or ".join(map(str, run_dirs))):
        return _compare(found, Path(out))


def _compare(found: list[Record], folder: Path) -> Path:
    lines = [line_of(record) for record in found]
    with matplotlib.rc_context(STYLE):
        pictures = draw(lines, found)
    for stem, (_, figure) in pictures.items():
        write_bytes(folder / f"{stem}.png", page.png(figure))
    text = page.template("compare.html").render(
        title=f"{len(lines)} runs",
        runs=[line.name for line in lines],
        tables=[table for table in tables(lines) if table.rows],
        figures=[(stem, caption, page.svg_data(figure)) for stem, (caption, figure) in pictures.items()],
    )
    write_bytes(folder / "report.html", text.encode())
    return folder / "report.html"


def draw(lines: list[Line], found: list[Record]) -> dict[str, tuple[str, Figure]]:
    """File stem -> (caption, figure): a Pareto picture for each network, and the fine-tuning curves."""
    pictures: dict[str, tuple[str, Figure]] = {}
    for network in dict.fromkeys(line.network for line in lines):
        points = [
            pareto.Point(line.name, line.bops, 100 * line.last)
            for line in lines
            if line.network == network and line.bops and line.last is not None
        ]
        if points:
            figure = pareto.accuracy_over_cost(points, marks_of(network))
            pictures["pareto-" + re.sub(r"[^\w.-]", "_", network)] = (f"{network}: accuracy and bit operations", figure)
    curves = pareto.curves({record.name: record.epochs("finetune") for record in found})
    if curves is not None:
        pictures["curves"] = ("Fine-tuning: test accuracy by epoch", curves)
    return pictures


def tables(lines: list[Line]) -> list[Table]:
    """Every run; rows that were run with several seeds; what was published for these networks."""
    return [_runs(lines), _seeds(lines), _published(lines)]


def _runs(lines: list[Line]) -> Table:
    header = (
        "Run",
        "Row",
        "#Seed",
        "#Float",
        "#Last epoch",
        "#Best (epoch)",
        "#Packed",
        "#Equal predictions",
        "#BOPs",
        "#Allowed",
        "#Reached by thresholds",
        "#Result",
        "Schedule",
        "#Training",
    )
    rows = []
    for line in lines:
        best = f"{percent(line.best)} ({line.best_epoch})" if line.best is not None else "-"
        rows.append(
            (
                line.name,
                line.label,
                "-" if line.seed is None else str(line.seed),
                percent(line.float_accuracy),
                percent(line.last),
                best,
                percent(line.packed),
                line.equal,
                bops(line.bops) if line.bops else "-",
                *(line.of_targets(key) for key in ("target", "thresholds", "value")),
                line.schedule,
                seconds(line.seconds) if line.seconds else "-",
            )
        )
    note = (
        "The weights of the last epoch are kept and packed; the best epoch was picked on the test images. What the "
        "trained thresholds had reached is followed by a projection to the result."
    )
    return Table("Runs", header, tuple(rows), note)


def _seeds(lines: list[Line]) -> Table:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line.last is not None and line.asked:
            groups.setdefault(line.asked, []).append(line)
    rows = []
    for group in groups.values():
        if len({line.seed for line in group}) > 1:
            values = [line.last for line in group if line.last is not None]
            best = [line.best for line in group if line.best is not None]
            costs = [line.bops for line in group if line.bops]
            rows.append(
                (
                    next((x.label for x in group if x.label != x.name), f"{group[0].network} {group[0].variant}"),
                    ", ".join(str(line.seed) for line in group),
                    percent(mean(values)),
                    f"{percent(min(values))} .. {percent(max(values))}",
                    percent(mean(best)) if best else "-",
                    f"{bops(min(costs))} .. {bops(max(costs))}" if costs else "-",
                    group[0].of_targets("target"),
                    " or ".join(dict.fromkeys(line.schedule for line in group)),
                )
            )
    header = ("Row", "Seeds", "#Mean, last epoch", "#From .. to", "#Mean, best epoch", "#BOPs", "#Allowed", "Schedule")
    note = "One row: equal networks, data, variants, targets, schedules and recipes, whatever the runs are called."
    return Table("Rows with several seeds", header, tuple(rows), note)


def _published(lines: list[Line]) -> Table:
    rows: list[tuple[str, ...]] = []
    for network in dict.fromkeys(line.network for line in lines):
        marks = marks_of(network)
        rows += [(network, mark.method, f"{mark.top1:.1f} %", bops(mark.bops)) for mark in marks]
    note = "arXiv 2101.04935; probably the best epoch of the full schedule, starting from other float networks."
    return Table("Published", ("Network", "Method", "#Top-1", "#BOPs"), tuple(rows), note)


def summary(run_dirs: Sequence[str | Path]) -> list[Line]:
    """The lines of the first table."""
    found = _records(run_dirs)
    with page.odd_told(" or ".join(map(str, run_dirs))):
        return [line_of(record) for record in found]
