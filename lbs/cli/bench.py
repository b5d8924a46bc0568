"""`lbs bench`: a packed network against torch, other engines and our uniform 8 bits, in one process, interleaved."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import lbs
from lbs.benchmark import BASELINES, DEFAULT_BASELINES
from lbs.cli.console import console
from lbs.cli.options import add_model, numbers
from lbs.cli.packed import add_source, source_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network, and against what it is timed."""
    add_source(parser)
    add_model(parser)
    parser.add_argument(
        "--batches", type=numbers, default=(1, 64), metavar="N,..", help="images per call (default 1,64)"
    )
    parser.add_argument(
        "--baselines",
        type=lambda text: tuple(text.split(",")),
        default=DEFAULT_BASELINES,
        metavar="NAME,..",
        help=f"of {', '.join(BASELINES)} (default {','.join(DEFAULT_BASELINES)}; what is not installed is listed)",
    )
    parser.add_argument(
        "--rounds", type=int, default=30, metavar="N", help="measurements of each contender (default 30)"
    )
    parser.add_argument(
        "--first-call", action="store_true", help="time the first call after a pause, not calls in a loop (CPU)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; with --run it is kept for the report."""
    out = console(args)
    source = source_of(args, with_float=True)
    with source.folder.held() if source.folder is not None else nullcontext():
        timed = lbs.bench(
            source.packed,
            batches=args.batches,
            threads=args.threads,
            model=source.float_model,
            baselines=args.baselines,
            rounds=args.rounds,
            first_call=args.first_call,
        )
        section = timed.to_json()
        if source.folder is not None:
            source.folder.add_result("bench", section)
    out.say(str(timed))
    out.finish(section)
    return 0
