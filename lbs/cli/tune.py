"""`lbs tune`: measure kernels on this machine; the choice of kernels and latency budgets use the times."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lbs.models
from lbs.cli.console import BarProgress, Console, console
from lbs.cli.options import add_exclude, add_streams, device_of, numbers, set_threads
from lbs.cli.packed import add_source, source_of
from lbs.run_folder import RunFolder
from lbs.runs import tuning
from lbs.search.streams import FLOAT
from lbs_kernels.device import default_threads
from lbs_kernels.errors import BackendError, LbsError, first_line
from lbs_kernels.gpu import kernels
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table
from lbs_kernels.tune import tuner
from lbs_kernels.tune.blame import Blame
from lbs_kernels.tune.roof import measure_roof

_PAIRS = "2/2,2/4,2/8,4/2,4/4,4/8,8/2,8/4,8/8"
_POINTS = 4  # kept sizes per axis
_OF_SHAPES = ("input_shape", "classes", "exclude", "streams", "bits", "points", "group")  # options of --shapes alone


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """`2/2,4/8` -> ((2, 2), (4, 8))."""
    found = tuple(tuple(int(bits) for bits in pair.split("/")) for pair in text.split(","))
    if not all(len(pair) == 2 for pair in found):
        raise argparse.ArgumentTypeError(f"{text!r} are no pairs of bits; write weight/activation, as 2/2,4/8")
    return found  # type: ignore[return-value]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, for how long."""
    add_source(parser, plans=True)
    shapes = parser.add_argument_group("float networks")
    shapes.add_argument(
        "--shapes",
        metavar="NAME,..",
        help=f"instead of a packed network: layers and calls of {', '.join(sorted(lbs.models.REGISTRY))}, timm:NAME, "
        "torchvision:NAME or module:function, the layers over a grid of kept filters on the processor",
    )
    shapes.add_argument(
        "--input-shape", type=numbers, default=(), metavar="C,H,W", help="one image of --shapes (default: the model's)"
    )
    shapes.add_argument("--classes", type=int, metavar="N", help="classes of --shapes (default: the model's)")
    add_exclude(shapes)
    add_streams(shapes)
    shapes.add_argument(
        "--bits",
        type=pairs,
        metavar="W/A,..",
        help="weight/activation bits of --shapes (default: every pair of 2, 4 and 8)",
    )
    shapes.add_argument(
        "--points",
        type=int,
        metavar="N",
        help=f"kept sizes per axis of a layer of --shapes (default {_POINTS}; 1: whole layers)",
    )
    shapes.add_argument("--group", type=int, metavar="N", help="filters kept or cut together (default: the model's)")
    measured = parser.add_argument_group("measuring")
    measured.add_argument("--batch", type=numbers, default=(1,), metavar="N,..", help="images per call (default 1)")
    measured.add_argument("--minutes", type=float, metavar="M", help="stop after this long; call again to go on")
    measured.add_argument("--again", action="store_true", help="measure what is known, too")
    measured.add_argument("--every", action="store_true", help="on a GPU: every configuration, not the nearest ones")


def run(args: argparse.Namespace) -> int:
    """Measure; 1 where a kernel gave a wrong result."""
    out = console(args)
    set_threads(args.threads)
    if args.minutes is not None and not args.minutes > 0:
        raise LbsError(f"--minutes {args.minutes}; give a positive number")
    device = device_of(args.device)
    todo, calls = _asked(args, device)
    threads = default_threads()
    blame = Blame(table.user_path(table.device_slug(str(device))).with_suffix(".broken"))
    measure: Callable[[Problem], tuner.Measured]
    if device.type == "cuda":
        todo = [form for problem in todo for form in kernels.forms_on(problem, str(device))]
        limit = None if args.every else tuner.NEIGHBOURS
        measure = functools.partial(tuner.measure_gpu, device=device, limit=limit, attempt=blame)
    else:
        measure = functools.partial(tuner.measure_cpu, threads=threads)
    roof = measure_roof(args.again) if device.type == "cpu" else None
    progress = _Progress(out, len(tuner.distinct(todo)) + len(calls))
    started, seconds = time.monotonic(), float("inf") if args.minutes is None else 60 * args.minutes
    timed: dict[str, float] = {}
    try:
        done = tuner.tune(
            todo,
            measure,
            tuner.known_on_gpu if device.type == "cuda" else tuner.known_on_cpu(threads),
            device=device.type,
            seconds=seconds,
            again=args.again,
            progress=progress.tell,
        )
        while calls and not done.left and time.monotonic() - started < seconds:  # a call is known by its layers
            call = calls.pop(0)
            took = call.measure(threads, args.again)
            progress.called(call, took)
            timed |= {} if took is None else {call.name: took}
    except RuntimeError as error:
        if isinstance(error, LbsError) or device.type != "cuda":
            raise
        raise BackendError(
            f"{blame.keep()} broke {device}: {first_line(error)}. It is left out from now on "
            f"({blame.path}), and what was measured before is kept: call again to go on"
        ) from error
    finally:
        progress.bar.end()
    left = f"{done.left} are left" + (f", and {len(calls)} calls" if calls else "")
    out.say(f"{done.measured} problems and {len(timed)} calls measured, {done.skipped} were known, {left}; {done.path}")
    wrong = [
        f"{row}: {reason}" for row, found in done.refused.items() for reason in found.values() if tuner.WRONG in reason
    ]
    for line in wrong:
        out.say(f"WRONG  {line}")
    if roof is not None:
        out.say(f"a matrix product of bytes reaches {roof / 1e9:.0f} G multiply-adds a second with {threads} threads")
    out.finish({**asdict(done), "wrong": wrong, "roof": roof, "calls": timed, "calls_left": len(calls)})
    return 1 if wrong else 0


def _asked(args: argparse.Namespace, device: torch.device) -> tuple[list[Problem], list[tuning.Call]]:
    """What was named: a packed network, a plan, or float networks. On a GPU no calls are timed."""
    kind = device.type
    named = [name for name in ("file", "run", "zoo") if getattr(args, name)]
    if not args.shapes:
        odd = [f"--{name.replace('_', '-')}" for name in _OF_SHAPES if getattr(args, name, None) not in (None, ())]
        if odd:
            raise LbsError(f"{', '.join(odd)} are for --shapes NAME, which is missing; name it, or leave them out")
        plan = None
        if len(named) == 1:  # else `source_of` says so
            plan = tuning.searched_plan(args.file and Path(args.file), RunFolder(args.run) if args.run else None)
        if plan is not None:
            return tuning.plan_problems(plan, args.batch, kind), []
        packed = source_of(args).packed
        return tuning.step_problems(packed, args.batch, kind), tuning.calls_of_packed(packed, args.batch)
    if named:
        raise LbsError(f"--shapes and {', '.join(named)} are both to be measured; name one of them, then call again")
    problems: list[Problem] = []
    calls: list[tuning.Call] = []
    bits = pairs(_PAIRS) if args.bits is None else args.bits
    points = (_POINTS if args.points is None else args.points) if kind == "cpu" else 1
    for name in args.shapes.split(","):
        shapes = tuning.shapes_of(name, args.input_shape, args.classes)
        problems += tuning.shape_problems(shapes, bits, args.batch, group=args.group, points=points, device=kind)
        if kind == "cpu":
            exclude, streams = tuple(getattr(args, "exclude", ())), getattr(args, "streams", FLOAT)
            calls += tuning.calls_of_shapes(shapes, bits, args.batch, exclude, streams)
    return problems, calls


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

    def called(self, call: tuning.Call, seconds: float | None) -> None:
        """One call is done; None: it was known."""
        self.done += 1
        self.bar.advance(1)
        if seconds is not None and not isinstance(self.bar, BarProgress):
            self.out.say(f"{self.done}/{self.total} a call, {call.name}: {seconds * 1e6:.1f} us")


def _line(measured: tuner.Measured) -> str:
    if not measured.seconds:
        return f"{measured.problem}: {'; '.join(measured.refused.values())}"
    best = min(measured.seconds, key=lambda name: measured.seconds[name])
    refused = f", {len(measured.refused)} refused" if measured.refused else ""
    return f"{measured.problem}: {measured.seconds[best] * 1e6:.1f} us, {best} of {len(measured.seconds)}{refused}"
