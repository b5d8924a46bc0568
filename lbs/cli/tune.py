"""`lbs tune`: measure kernels on this machine; the choice of kernels and latency budgets use the times."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import lbs.cost
import lbs.models
from lbs.cli.console import BarProgress, Console, console
from lbs.cli.options import device_of, numbers, set_threads
from lbs.cli.packed import add_source, source_of
from lbs.cost.latency import latency_grid
from lbs_kernels.device import default_threads
from lbs_kernels.errors import BackendError, LbsError, first_line
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.times import table
from lbs_kernels.tune import tuner
from lbs_kernels.tune.blame import Blame
from lbs_kernels.tune.roof import measure_roof


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """`2/2,4/8` -> ((2, 2), (4, 8))."""
    found = tuple(tuple(int(bits) for bits in pair.split("/")) for pair in text.split(","))
    if not all(len(pair) == 2 for pair in found):
        raise argparse.ArgumentTypeError(f"{text!r} are no pairs of bits; write weight/activation, as 2/2,4/8")
    return found  # type: ignore[return-value]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, for how long."""
    add_source(parser)
    parser.add_argument(
        "--shapes",
        metavar="NAME,..",
        help=f"instead of a packed network: layers of {', '.join(sorted(lbs.models.REGISTRY))}, over a grid of kept "
        "filters on the processor",
    )
    parser.add_argument("--batch", type=numbers, default=(1,), metavar="N,..", help="images per call (default 1)")
    parser.add_argument(
        "--bits",
        type=pairs,
        default=pairs("2/2,2/4,2/8,4/2,4/4,4/8,8/2,8/4,8/8"),
        metavar="W/A,..",
        help="weight/activation bits of --shapes (default: every pair of 2, 4 and 8)",
    )
    parser.add_argument(
        "--points",
        type=int,
        default=4,
        metavar="N",
        help="kept sizes per axis of a layer (default 4; 1: whole layers)",
    )
    parser.add_argument("--group", type=int, default=8, metavar="N", help="filters kept or cut together (default 8)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after this long; call again to go on")
    parser.add_argument("--again", action="store_true", help="measure what is known, too")
    parser.add_argument("--every", action="store_true", help="on a GPU: every configuration, not the nearest ones")


def run(args: argparse.Namespace) -> int:
    """Measure; 1 where a kernel gave a wrong result."""
    out = console(args)
    set_threads(args.threads)
    if args.minutes is not None and not args.minutes > 0:
        raise LbsError(f"--minutes {args.minutes}; give a positive number")
    device = device_of(args.device)
    todo = _problems(args, device)
    threads = default_threads()
    blame = Blame(table.user_path(table.device_slug(str(device))).with_suffix(".broken"))
    measure: Callable[[Problem], tuner.Measured]
    if device.type == "cuda":
        limit = None if args.every else tuner.NEIGHBOURS
        measure = functools.partial(tuner.measure_gpu, device=device, limit=limit, attempt=blame)
    else:
        measure = functools.partial(tuner.measure_cpu, threads=threads)
    roof = measure_roof(args.again) if device.type == "cpu" else None
    progress = _Progress(out, len(tuner.distinct(todo)))
    try:
        done = tuner.tune(
            todo,
            measure,
            tuner.known_on_gpu if device.type == "cuda" else tuner.known_on_cpu(threads),
            device=device.type,
            seconds=float("inf") if args.minutes is None else 60 * args.minutes,
            again=args.again,
            progress=progress.tell,
        )
    except RuntimeError as error:
        if isinstance(error, LbsError) or device.type != "cuda":
            raise
        raise BackendError(
            f"{blame.keep()} broke {device}: {first_line(error)}. It is left out from now on "
            f"({blame.path}), and what was measured before is kept: call again to go on"
        ) from error
    finally:
        progress.bar.end()
    out.say(f"{done.measured} problems measured, {done.skipped} were known, {done.left} are left; {done.path}")
    wrong = [
        f"{row}: {reason}" for row, found in done.refused.items() for reason in found.values() if tuner.WRONG in reason
    ]
    for line in wrong:
        out.say(f"WRONG  {line}")
    if roof is not None:
        out.say(f"a matrix product of bytes reaches {roof / 1e9:.0f} G multiply-adds a second with {threads} threads")
    out.finish({**asdict(done), "wrong": wrong, "roof": roof})
    return 1 if wrong else 0


def _problems(args: argparse.Namespace, device: torch.device) -> list[Problem]:
    """What was named: the steps of a packed network, or the layers of networks."""
    if not args.shapes:
        programs = source_of(args).packed.programs
        return [
            problem_of(step, program, batch, device.type)
            for batch in args.batch
            for program in programs
            for step in program.steps
        ]
    found: list[Problem] = []
    for name in args.shapes.split(","):
        layers = lbs.cost.network_layers(lbs.models.create(name), lbs.models.example(name))
        points = args.points if device.type == "cpu" else 1
        for batch in args.batch:
            found += latency_grid(layers, args.bits, batch=batch, group=args.group, points=points, device=device.type)
    return found


class _Progress:
    """A bar on a terminal, else one line per problem that was measured."""

    def __init__(self, out: Console, total: int) -> None:
        self.out, self.total, self.done = out, total, 0
        self.bar: Any = out.progress()
        self.bar.begin("tune", total, 0)

    def tell(self, measured: tuner.Measured | None) -> None:
        """One problem is done; None: it was known."""
        self.done += 1
        self.bar.advance(1)
        if measured is not None and not isinstance(self.bar, BarProgress):
            self.out.say(f"{self.done}/{self.total} {_line(measured)}")


def _line(measured: tuner.Measured) -> str:
    if not measured.seconds:
        return f"{measured.problem}: {'; '.join(measured.refused.values())}"
    best = min(measured.seconds, key=lambda name: measured.seconds[name])
    refused = f", {len(measured.refused)} refused" if measured.refused else ""
    return f"{measured.problem}: {measured.seconds[best] * 1e6:.1f} us, {best} of {len(measured.seconds)}{refused}"
