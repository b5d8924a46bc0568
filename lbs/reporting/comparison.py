"""`lbs report RUN RUN ...`: several runs in one table, and in pictures of accuracy against what they cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lbs.reporting import page, pareto, records
from lbs.reporting.asked import asked_of, variant
from lbs.reporting.published import NETWORKS, Mark, marks_of
from lbs.reporting.records import PACKED, Record
from lbs.reporting.style import STYLE
from lbs.reporting.tables import Table
from lbs.reporting.units import bops, percent, quantity, seconds, size
from lbs.run_folder import write_bytes
from lbs_kernels.errors import CheckpointError, LbsError, first_line


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
    bytes: int | None  # of the packed file
    times: dict[int, float]  # batch -> seconds of a call of the packed network
    timed_on: str  # the processor and its threads; "": not timed

    @property
    def accuracy(self) -> float | None:
        """Of the last epoch of fine-tuning, else of the packed network."""
        return self.packed if self.last is None else self.last

    def of_targets(self, key: str) -> str:
        """One number of every target, such as `630.6M, 5.5 kB`; a dash where no target has it."""
        shown = [quantity(name, row[key], row["modelled"]) for name, row in self.targets.items()]
        return ", ".join(shown) if set(shown) - {"-"} else "-"


def line_of(record: Record) -> Line:
    """Read from the record of a reproduced row where there is one, else from the sections of results.json."""
    model, classes = str(record.network.get("model", "?")), int(record.network.get("num_classes", 0))
    images, equal = record.value("verify", "images"), record.value("verify", "equal_predictions")
    spent = [record.value(phase, "seconds") for phase in ("float", "search", "finetune")]
    packed = record.value("verify", "packed_accuracy")
    timed = {int(row["batch"]): float(row["median"]) for row in record.bench_rows() if row["contender"] == PACKED}
    machine = f"{record.value('bench', 'device')}, {record.value('bench', 'threads')} threads" if timed else ""
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
        packed=record.accuracy(PACKED) if packed is None else packed,
        equal=f"{equal} of {images}" if images is not None else "-",
        targets=record.targets(),
        bops=sum(row.bops for row in record.layers) or None,
        full=sum(row.full_bops for row in record.layers) or None,
        seconds=sum(x for x in spent if x is not None) or None,
        variant=record.made.get("variant") or variant(record),
        asked=asked_of(record),
        bytes=record.value("pack", "bytes"),
        times=timed,
        timed_on=machine,
    )


def _schedule(record: Record) -> str:
    epochs = [record.value(phase, "epochs") for phase in ("search", "finetune")]
    return "+".join(str(x) for x in epochs if x is not None) + " epochs" if any(epochs) else "-"


@dataclass(frozen=True)
class Gathered:
    """Runs that were asked for: lines and records of those that can be told, and why the others are left out."""

    lines: list[Line]
    found: list[Record]
    left_out: dict[str, str] = field(default_factory=dict)


def gather(run_dirs: Sequence[str | Path], budget: float | None = 1.0) -> Gathered:
    """Read run folders and packed files, named by their paths, with as many folders as tell them apart.

    Raises:
        CheckpointError: none of them can be read; the reasons of all are in it.
    """
    parts = [Path(folder).resolve().parts for folder in run_dirs]
    depth = next((n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts))), 1)
    gathered = Gathered([], [])
    for folder, own in zip(run_dirs, parts, strict=True):
        name = "/".join(own[-depth:])
        try:
            record = replace(records.read(folder, budget=budget), name=name)
            with page.odd_told(folder):
                line = line_of(record)
        except LbsError as error:
            gathered.left_out[name] = first_line(error)
            continue
        gathered.lines.append(line)
        gathered.found.append(record)
    if not gathered.lines:
        raise CheckpointError("no run can be read: " + "; ".join(gathered.left_out.values()))
    return gathered


def compare(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.html and the SVG files of a comparison into `out`; returns the path of the page.

    A run that cannot be read is left out, and named on the page with the reason.

    Raises:
        CheckpointError: no run can be read, or a full disk.
    """
    return write(gather(run_dirs), out)


def write(gathered: Gathered, out: str | Path) -> Path:
    """As `compare`, of runs that were read."""
    folder, lines = Path(out), gathered.lines
    with page.odd_told(" or ".join(record.path for record in gathered.found)):
        with matplotlib.rc_context(STYLE):
            pictures, notes = draw(lines, gathered.found)
        text = page.template("compare.html").render(
            title=f"{len(lines)} runs",
            runs=[line.name for line in lines],
            left_out=[*gathered.left_out.items(), *_in_no_picture(lines)],
            tables=[table for table in tables(lines) if table.rows],
            figures=page.save_pictures(pictures, folder, notes),
        )
        body = text.encode()
    write_bytes(folder / "report.html", body)
    return folder / "report.html"


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


def _in_no_picture(lines: list[Line]) -> list[tuple[str, str]]:
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


def tables(lines: list[Line]) -> list[Table]:
    """Every run; what was asked of it; rows that were run with several seeds; what was published for these networks."""
    return [_runs(lines), _asked(lines), _seeds(lines), _published(lines)]


def _runs(lines: list[Line]) -> Table:
    batches = sorted({batch for line in lines for batch in line.times})
    header = ("Run", "#Float", "#Last epoch", "#Best (epoch)", "#Packed", "#Equal predictions", "#BOPs", "#File")
    rows = []
    for line in lines:
        best = f"{percent(line.best)} ({line.best_epoch})" if line.best is not None else "-"
        shares = (percent(line.float_accuracy), percent(line.last), best, percent(line.packed), line.equal)
        weight = size(line.bytes) if line.bytes else "-"
        took = (seconds(line.times[batch]) if batch in line.times else "-" for batch in batches)
        rows.append((line.name, *shares, bops(line.bops) if line.bops else "-", weight, *took))
    machines = dict.fromkeys(line.timed_on for line in lines if line.timed_on)
    note = (
        "The weights of the last epoch are kept and packed; the best epoch was picked on the test images."
        + (f" Times: {'; '.join(machines)}." if machines else "")
        + (" Compare times of one machine only." if len(machines) > 1 else "")
    )
    return Table("Runs", header + tuple(f"#Time, batch {batch}" for batch in batches), tuple(rows), note)


def _asked(lines: list[Line]) -> Table:
    header = ("Run", "Row", "#Seed", "#Allowed", "#Reached by thresholds", "#Result", "Schedule", "#Training")
    rows = []
    for line in lines:
        numbers = (line.of_targets(key) for key in ("target", "thresholds", "value"))
        spent = seconds(line.seconds) if line.seconds else "-"
        seed = "-" if line.seed is None else str(line.seed)
        rows.append((line.name, line.label, seed, *numbers, line.schedule, spent))
    note = "What the trained thresholds had reached is followed by a projection to the result."
    return Table("What was asked of them", header, tuple(rows), note)


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
