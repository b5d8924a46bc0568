"""`lbs report`: the page and the pictures of one network, before and after, or of several runs side by side."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lbs.cli.console import Console, console
from lbs.cli.options import add_budget
from lbs.reporting.comparison import write
from lbs.reporting.gathered import Gathered, gather
from lbs.reporting.page import odd_told, report
from lbs.reporting.units import bops, percent, seconds, size
from lbs_kernels.errors import LbsError

COMPARISON = "runs/comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folders, or packed files."""
    parser.add_argument("run", nargs="+", metavar="PATH", help="run folder, or packed file; several are compared")
    parser.add_argument("--bench", metavar="FILE", help="of one packed file: what lbs bench --json printed of it")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"where report.html and *.svg go (default: the run folder, FILE-report, of several {COMPARISON})",
    )
    add_budget(parser)


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is; of several runs print the table too."""
    out = console(args)
    gathered = None
    if len(args.run) == 1:
        page = report(args.run[0], bench=args.bench, out=args.out, budget=args.budget)
    elif args.bench:
        raise LbsError(f"--bench {args.bench} is of one packed file; {len(args.run)} paths are named")
    else:
        gathered = gather(args.run, args.budget)
        page = write(gathered, args.out or COMPARISON)
        with odd_told(" or ".join(args.run)):
            _told(out, gathered)
    pictures = sorted(path.name for path in page.parent.glob("*.svg"))
    out.say(f"wrote {page} and {', '.join(pictures) or 'no pictures'}")
    several = {"runs": [asdict(line) for line in gathered.lines], "left_out": gathered.left_out} if gathered else {}
    out.finish({"page": str(page), "pictures": pictures, **several})
    return 0


def _told(out: Console, gathered: Gathered) -> None:
    """A line for every run, and for every one that is left out."""
    for line in gathered.lines:
        cost = bops(line.bops) if line.bops else "-"
        allowed, before = line.of_targets("target"), line.of_targets("thresholds")
        budget = f" (allowed {allowed}, thresholds reached {before})" if line.targets else ""
        weight = size(line.bytes) if line.bytes else "-"
        took = ", ".join(f"{seconds(time)} at batch {batch}" for batch, time in line.times.items()) or "not timed"
        out.say(
            f"{line.name:28s} {line.label:32s} seed {line.seed}  last {percent(line.last)}  best {percent(line.best)}  "
            f"{cost} BOPs{budget}  {weight}  {took}  {line.schedule}"
        )
    for name, reason in gathered.left_out.items():
        out.say(f"left out: {name}: {reason}")
