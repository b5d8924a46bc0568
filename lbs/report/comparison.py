"""`lbs report RUN RUN ...`: several runs in one table, and in one picture of accuracy against bit operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lbs.report import page, pareto, records
from lbs.report.plots import STYLE
from lbs.report.published import NETWORKS, marks_of
from lbs.report.records import Record
from lbs.report.tables import Table
from lbs.report.units import bops, percent, seconds
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
    target: float | None
    bops: int | None
    full: int | None
    seconds: float | None


def line_of(record: Record) -> Line:
    """Read from the record of a reproduced row where there is one, else from the sections of results.json."""
    model, classes = str(record.network.get("model", "?")), int(record.network.get("num_classes", 0))
    config = record.config.get("finetune", {})
    images, equal = record.value("verify", "images"), record.value("verify", "equal_predictions")
    spent = [record.value(phase, "seconds") for phase in ("float", "search", "finetune")]
    return Line(
        name=record.name,
        label=record.made.get("row") or record.name,
        network=record.made.get("network") or NETWORKS.get((model, classes), model),
        seed=config.get("seed"),
        schedule=record.made.get("schedule") or _schedule(record),
        float_accuracy=record.value("float", "accuracy"),
        last=record.value("finetune", "accuracy"),
        best=record.value("finetune", "best_accuracy"),
        best_epoch=record.value("finetune", "best_epoch"),
        packed=record.value("verify", "packed_accuracy"),
        equal=f"{equal} of {images}" if images is not None else "-",
        target=record.value("search", "target_bops"),
        bops=sum(row.bops for row in record.layers) or None,
        full=sum(row.full_bops for row in record.layers) or None,
        seconds=sum(x for x in spent if x is not None) or None,
    )


def _schedule(record: Record) -> str:
    epochs = [record.value(phase, "epochs") for phase in ("search", "finetune")]
    return "+".join(str(x) for x in epochs if x is not None) + " epochs" if any(epochs) else "-"


def compare(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.html and the PNG files of a comparison into `out`; returns the path of the page.

    Raises:
        CheckpointError: a folder that holds no run, a damaged file, or a full disk.
    """
    found = [records.read(folder) for folder in run_dirs]
    lines = [line_of(record) for record in found]
    with matplotlib.rc_context(STYLE):
        pictures = draw(lines, found)
    folder = Path(out)
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
            pictures[f"pareto-{network}"] = (f"{network}: accuracy and bit operations", figure)
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
                bops(line.target) if line.target else "-",
                line.schedule,
                seconds(line.seconds) if line.seconds else "-",
            )
        )
    note = "The weights of the last epoch are kept and packed; the best epoch was picked on the test images."
    return Table("Runs", header, tuple(rows), note)


def _seeds(lines: list[Line]) -> Table:
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.last is not None:
            groups.setdefault((line.label, line.schedule), []).append(line)
    rows = []
    for (label, schedule), group in groups.items():
        if len({line.seed for line in group}) > 1:
            values = [line.last for line in group if line.last is not None]
            best = [line.best for line in group if line.best is not None]
            costs = [line.bops for line in group if line.bops]
            rows.append(
                (
                    label,
                    ", ".join(str(line.seed) for line in group),
                    percent(mean(values)),
                    f"{percent(min(values))} .. {percent(max(values))}",
                    percent(mean(best)) if best else "-",
                    f"{bops(min(costs))} .. {bops(max(costs))}" if costs else "-",
                    schedule,
                )
            )
    header = ("Row", "Seeds", "#Mean, last epoch", "#From .. to", "#Mean, best epoch", "#BOPs", "Schedule")
    return Table("Rows with several seeds", header, tuple(rows))


def _published(lines: list[Line]) -> Table:
    rows: list[tuple[str, ...]] = []
    for network in dict.fromkeys(line.network for line in lines):
        marks = marks_of(network)
        rows += [(network, mark.method, f"{mark.top1:.1f} %", bops(mark.bops)) for mark in marks]
    note = "arXiv 2101.04935; probably the best epoch of the full schedule, starting from other float networks."
    return Table("Published", ("Network", "Method", "#Top-1", "#BOPs"), tuple(rows), note)


def summary(run_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The lines of the first table, for JSON."""
    return [line_of(records.read(folder)).__dict__ for folder in run_dirs]
