"""`lbs report`: report.html and the pictures of a run folder."""

from __future__ import annotations

import argparse

from lbs.cli.console import console
from lbs.report.page import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folder."""
    parser.add_argument("run", metavar="DIR", help="run folder; report.html and *.png are written into it")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    out = console(args)
    page = report(args.run)
    pictures = sorted(path.name for path in page.parent.glob("*.png"))
    out.say(f"wrote {page} and {', '.join(pictures) or 'no pictures'}")
    out.finish({"page": str(page), "pictures": pictures})
    return 0
