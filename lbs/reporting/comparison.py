"""`lbs report RUN RUN ...`: several runs in tables, and in pictures of accuracy against what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from lbs.reporting import page
from lbs.reporting.comparison_pictures import draw, in_no_picture
from lbs.reporting.gathered import Gathered, Line, gather
from lbs.reporting.published import marks_of
from lbs.reporting.style import STYLE
from lbs.reporting.tables import Table
from lbs.reporting.units import bops, percent, seconds, size
from lbs.run_folder import write_bytes


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
            left_out=[*gathered.left_out.items(), *in_no_picture(lines)],
            tables=[table for table in tables(lines) if table.rows],
            figures=page.save_pictures(pictures, folder, notes),
        )
        body = text.encode()
    write_bytes(folder / "report.html", body)
    return folder / "report.html"


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
