"""`lbs report`: the page and the pictures of a run, or of several runs side by side."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lbs.cli.console import console
from lbs.reporting.comparison import compare, summary
from lbs.reporting.page import odd_told, report
from lbs.reporting.units import bops, percent
from lbs_kernels.errors import LbsError

COMPARISON = "runs/comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folders."""
    parser.add_argument("run", nargs="+", metavar="DIR", help="run folder; report.html and *.png are written into it")
    parser.add_argument("--out", metavar="DIR", help=f"where a comparison of several runs goes (default {COMPARISON})")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is; of several runs print the table too."""
    out = console(args)
    several = len(args.run) > 1
    if args.out and not several:
        raise LbsError(f"--out {args.out} is for several runs; the page of one is written into its own folder")
    page = compare(args.run, args.out or COMPARISON) if several else report(args.run[0])
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    lines = summary(args.run) if several else []
    with odd_told(" or ".join(args.run)):
        for line in lines:
            cost = bops(line.bops) if line.bops else "-"
            allowed, before = line.of_targets("target"), line.of_targets("thresholds")
            budget = f" (allowed {allowed}, thresholds reached {before})" if line.targets else ""
            out.say(
                f"{line.name:28s} {line.label:32s} seed {line.seed}  last {percent(line.last)}  "
                f"best {percent(line.best)}  {cost} BOPs{budget}  {line.schedule}"
            )
    out.say(f"wrote {page} and {', '.join(pictures) or 'no pictures'}")
    rows = {"runs": [asdict(line) for line in lines]} if several else {}
    out.finish({"page": str(page), "pictures": pictures, **rows})
    return 0
