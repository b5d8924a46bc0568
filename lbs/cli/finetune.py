"""`lbs finetune`: the searched network, a plan by hand, or a uniform baseline, trained at fixed bits."""

from __future__ import annotations

import argparse

from lbs.cli.console import console
from lbs.cli.options import add_exclude, add_streams, add_training, asked, decimal, numbers, session
from lbs.config import FinetuneRun, open_run
from lbs.reporting.units import bops
from lbs.runs.phases import run_finetune
from lbs.train import distributed
from lbs_kernels.errors import PlanError

_UNSET = argparse.SUPPRESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of fine-tuning."""
    add_training(parser, FinetuneRun)
    bits = parser.add_argument_group("bits", "those of the search in the run folder, or")
    bits.add_argument("--plan", default=_UNSET, metavar="FILE", help="a plan written by hand, applied to --weights")
    bits.add_argument(
        "--uniform", type=numbers, default=_UNSET, metavar="W,A", help="one width for all weights, one for activations"
    )
    add_exclude(bits)
    add_streams(bits)
    more = parser.add_argument_group("teacher and average")
    more.add_argument("--teacher", default=_UNSET, metavar="NAME", help="another network for --distill to follow")
    more.add_argument("--teacher-weights", default=_UNSET, metavar="FILE", help="its float weights")
    more.add_argument(
        "--ema",
        type=decimal,
        default=_UNSET,
        metavar="D",
        help="keep the running average of the weights, of this decay (default 0: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Fine-tune and print last and best accuracy."""
    out = console(args)
    options = asked(args)
    if len(options.get("uniform", (8, 8))) != 2:
        raise PlanError(f"--uniform {options['uniform']}: give two widths, weights and activations, such as 4,4")
    if options.get("uniform") and options.get("plan"):
        raise PlanError("--uniform and --plan both name the bits; leave one of them out")
    with session(args, out) as current:
        folder, processes = current.folder, distributed.world_size()
        config = distributed.first(
            lambda: open_run(FinetuneRun, folder, options, args.resume, inherit="search", processes=processes)
        )
        folder.note_environment()
        section = run_finetune(config, current)
    if section["accuracy"] is not None:
        out.say(
            f"fine-tuned: {section['accuracy']:.2%} after the last epoch (kept), best {section['best_accuracy']:.2%} "
            f"in epoch {section['best_epoch']}; {bops(section['bops'])} BOPs"
        )
    out.say(f"next: lbs pack --run {args.run}")
    out.finish(section)
    return 0
