"""`lbs bench`: a packed network against torch, other engines and our uniform 8 bits, in one process, interleaved."""

from __future__ import annotations

import argparse
from typing import Any

import lbs
import lbs.data
from lbs.cli.console import console
from lbs.cli.main import as_options
from lbs.cli.options import decimals, numbers
from lbs.cli.packed import add_source, check_statistics, known_statistics, source_of, statistics_of
from lbs.contenders import BASELINES, DEFAULT_BASELINES
from lbs.packing.model import PackedModel
from lbs.runs import network
from lbs.runs.bench_images import COUNT, BenchImages, of_data, of_folder
from lbs.runs.packed import float_of
from lbs.runs.stages import bench_run
from lbs_kernels.errors import LbsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network, and against what it is timed."""
    add_source(parser)
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="the float network of FILE; of a run its module:function, which is called only if named here",
    )
    parser.add_argument("--weights", metavar="FILE", help="of that network (default: random ones, for times alone)")
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

    pictures = parser.add_argument_group(
        "images", "what sets the ranges of the engines and gives accuracies (default: the data of the run)"
    )
    pictures.add_argument("--data", metavar="SET", help="labelled: digits, a .npz file, a folder with classes, ...")
    pictures.add_argument("--images", metavar="DIR", help="pictures without labels: classes are compared with float")
    pictures.add_argument("--count", type=int, metavar="N", help=f"how many are asked (default {COUNT})")
    pictures.add_argument("--mean", type=decimals, default=(), metavar="M,..", help="pixel mean per channel, of 0..1")
    pictures.add_argument("--std", type=decimals, default=(), metavar="S,..", help="pixel deviation per channel")


def run(args: argparse.Namespace) -> int:
    """Print the table; with --run it is kept for the report."""
    out = console(args)
    if args.weights and (args.run or args.zoo or not hasattr(args, "model")):
        raise LbsError(f"--weights {args.weights} needs --model NAME, the float network of FILE")
    source = source_of(args, with_float=True)
    options: dict[str, Any] = {
        "batches": args.batches,
        "threads": args.threads,
        "baselines": args.baselines,
        "rounds": args.rounds,
        "first_call": args.first_call,
        "progress": lambda step: out.step(f"{step} ..."),
    }
    images = _images(args, source.packed)
    if images is not None:
        out.say(f"images: {images.told}")
        options |= images.options()
    if source.folder is not None:
        section = bench_run(source.folder, out.say, source, args.budget, **options)
    else:
        model = source.float_model
        if model is None and hasattr(args, "model"):
            model = float_of(source.packed, args.model, args.weights or "")
        timed = lbs.bench(source.packed, model=model, **options)
        section = timed.to_json()
        out.say(as_options(str(timed), "bench"))
    out.finish(section)
    return 0


def _images(args: argparse.Namespace, packed: PackedModel) -> BenchImages | None:
    """Those that were named; None leaves a run its own data, and a file random numbers."""
    if args.data and args.images:
        raise LbsError("--data and --images both name images; leave one of them out")
    count = COUNT if args.count is None else args.count
    if args.data:
        check_statistics(args, packed)
        mean, std = (args.mean, args.std) if args.mean or args.std else known_statistics(args)
        return of_data(network.load_data(args.data, mean, std), packed, count)
    if args.images:
        return of_folder(args.images, packed, *statistics_of(args, packed), count)
    if args.count is not None or args.mean or args.std:
        raise LbsError("--count, --mean and --std are of images, and none are named; give --data SET or --images DIR")
    return None
