"""`lbs explain`: every layer of a packed network."""

from __future__ import annotations

import argparse

import lbs
from lbs.cli.console import console
from lbs.cli.packed import add_source, source_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network, and how it is timed."""
    add_source(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per run (default 1)")
    parser.add_argument("--gpu", default="", metavar="NAME", help="add modelled times of a GPU, such as nvidia-h200")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    out = console(args)
    explanation = lbs.explain(source_of(args).packed, batch=args.batch, threads=args.threads, gpu=args.gpu)
    out.say(str(explanation))
    out.finish(explanation.to_json())
    return 0
