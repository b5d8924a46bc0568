"""`lbs verify`: is the packed file the network that was trained?"""

from __future__ import annotations

import argparse

from lbs.cli.console import Console, console
from lbs.cli.options import add_budget, add_model, folder_of, set_threads
from lbs.reporting.units import percent
from lbs.runs.stages import verify_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folder, and how much is compared."""
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder with a packed network")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="test images compared code by code")
    parser.add_argument("--strict", action="store_true", help="fail if any prediction differs, even on a boundary")
    add_budget(parser)
    add_model(parser)
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own number)")


def run(args: argparse.Namespace) -> int:
    """Compare, and return 1 where something differs that no rounding boundary explains."""
    out = console(args)
    set_threads(args.threads)
    section = verify_run(folder_of(args), args.images, args.strict, args.budget)
    show(out, section)
    out.finish(section)
    return 0 if section["passed"] else 1


def show(out: Console, section: dict[str, object]) -> None:
    """The result in two lines."""
    out.say(
        f"codes: {section['codes']} compared, {section['codes_on_boundary']} on a rounding boundary; "
        f"first difference: {section['first_difference'] or 'none'}"
    )
    out.say(
        f"predictions: {section['equal_predictions']} of {section['images']} equal, outputs bit for bit on "
        f"{section['identical_outputs']}; top-1 packed "
        f"{percent(section['packed_accuracy'])}, trained {percent(section['trained_accuracy'])}: "  # type: ignore[arg-type]
        f"{'passed' if section['passed'] else 'FAILED'}"
    )
