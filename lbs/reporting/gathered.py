"""Several runs as they are compared: a line for each that can be read, and why the others are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lbs.reporting import page, records
from lbs.reporting.asked import asked_of, variant
from lbs.reporting.published import NETWORKS
from lbs.reporting.records import PACKED, Record
from lbs.reporting.units import quantity
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
