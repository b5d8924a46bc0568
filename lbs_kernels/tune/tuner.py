"""Measures problems and keeps the times: what `lbs tune` and the benchmarks do, without their words.

Exactness comes first: an implementation whose result differs from the reference is refused and gets no time.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.kernels import Choice
from lbs_kernels.gpu.layout import to_logical
from lbs_kernels.gpu.pair_layer import OPS as PAIR_OPS
from lbs_kernels.gpu.pair_layer import pair_layer
from lbs_kernels.program.layer import LAYER, layer_program, result_of
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.window import Window
from lbs_kernels.run import algorithms
from lbs_kernels.run.cpu import CpuRunner
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times import stopwatch
from lbs_kernels.times import table as tuning_table
from lbs_kernels.times.stopwatch import SelfTimed, Times
from lbs_kernels.times.table import TuningTable

NEIGHBOURS = 12  # configurations of one kernel timed besides its default
FINALISTS = 6  # of many, those that are timed carefully
VISITS = 8  # to a problem on the processor
APART = 10e-3  # seconds between two
REFERENCE = "reference"
BROKE = "it broke the device before"  # in place of a time
WRONG = "differ from the reference"  # in the reason of whatever was refused for its result
Call = Callable[[], object]


class WrongResultError(BackendError):
    """A kernel's result differs from the reference, so its speed means nothing."""


@dataclass(frozen=True)
class Measured:
    """Seconds by implementation, as tuning tables name and understand them, and why others have none.

    times: of one interleaved run, with their spread; on a GPU the finalists and the caller's own contenders.
    """

    problem: Problem
    seconds: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)


class Layer:
    """One problem on a device: its program, a fresh random batch, and the reference's result for two of its images."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        pair = pair_layer(problem) if problem.op in PAIR_OPS else None
        if pair is None:
            self.program, self.blob = layer_program(problem)
            self.result = result_of(problem)
        else:
            self.program, self.blob, self.result = pair.program, pair.blob, pair.result
        # What a GPU runs: two steps that are one there.
        self.on_gpu = (self.program, self.blob) if pair is None else (pair.one, pair.one_blob)
        spec = self.program.tensors[self.program.inputs[0]]
        shape = (problem.batch, spec.channels, spec.height, spec.width)
        self.image = torch.rand(shape, dtype=torch.float32, device=device)
        self.step = [step.name for step in self.on_gpu[0].steps].index(LAYER)
        self.checked = sorted({0, problem.batch - 1})
        trace: dict[int, Tensor] = {}
        ReferenceRunner(self.program, self.blob.to(device)).run([self.image[self.checked]], trace)
        self.expected = trace[self.result]

    def launch(self, choice: Choice) -> Call:
        """The step's launch with one GPU kernel, after its result was compared. Raises WrongResultError."""
        from lbs_kernels.gpu.runner import GpuRunner  # needs Triton; the CPU's part does not

        runner = GpuRunner(*self.on_gpu, self.device, {LAYER: choice.config})
        plan = runner.plan(self.problem.batch)
        for launch in plan.launches[: self.step + 1]:  # a step behind it may take its result's memory
            launch([self.image])
        written = to_logical(plan.buffers[self.result][self.checked], self.program.tensors[self.result])
        self._compare(written, choice.name, choice.kernel.exact)
        return functools.partial(plan.launches[self.step], [self.image])

    def natives(self, threads: int) -> dict[str, CpuRunner]:
        """The program by every algorithm that can serve the step, under the names of tuning tables."""
        found: dict[str, CpuRunner] = {}
        for wish in algorithms.WISHES.values():
            runner = CpuRunner(self.program, self.blob, algorithms={LAYER: wish})
            found.setdefault(tuning_table.native(threads, runner.native.algorithms[self.step]), runner)
        return found

    def inside(self, runner: CpuRunner, name: str, threads: int) -> Call:
        """The step inside one native call, which times itself. Raises WrongResultError."""
        trace: dict[int, Tensor] = {}
        runner.run([self.image], trace, threads=threads)
        self._compare(trace[self.result][self.checked], name)
        return SelfTimed(lambda: runner.step_seconds([self.image], threads=threads, rounds=1)[self.step])

    def _compare(self, actual: Tensor, name: str, exact: bool = True) -> None:
        """Equal; of a fallback codes by one, and floats by the rounding of a float16 accumulator (twice, for K's)."""
        differs = actual != self.expected
        if not exact and actual.dtype is torch.uint8:
            differs = (actual.int() - self.expected.int()).abs() > 1
        elif not exact:
            differs = ~((actual - self.expected).abs() <= 2.0**-10 * (1 + self.expected.abs()))
        if bool(differs.any()):
            wrong = float(differs.float().mean())
            raise WrongResultError(f"{self.problem} on {name}: {wrong:.2%} of the elements {WRONG}")


def measure_cpu(problem: Problem, threads: int, rounds: int = 15) -> Measured:
    """The native back end's times for one problem, of every algorithm that can serve: see `times.table.native`."""
    try:
        layer = Layer(problem, torch.device("cpu"))
        runners = layer.natives(threads)
    except FormatError as error:
        return Measured(problem, {}, {tuning_table.native(threads): str(error)})
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name, runner in runners.items():
        try:
            calls[name] = layer.inside(runner, name, threads)
        except WrongResultError as error:
            refused[name] = str(error)
    times = _in_visits(calls, rounds)
    return Measured(problem, {name: one.p20 for name, one in times.items()}, refused, times)


def _in_visits(calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """At least so many rounds, in visits that lie apart: what others do to the machine lasts longer than all of them.

    On two shared processors (AMD EPYC family 26) the quartiles of repeated measurements lay 5 % apart by the median of
    one visit, 2 % by the 20th percentile of eight.
    """
    visits = []
    for _ in range(VISITS):
        visits.append(stopwatch.interleave(calls, rounds=-(-rounds // VISITS), warmup=0.002))
        time.sleep(APART)
    return {name: Times(name, sum((visit[name].seconds for visit in visits), ())) for name in calls}


def shortlist(problem: Problem, limit: int | None = NEIGHBOURS) -> list[Choice]:
    """The default, `limit` of its neighbours in different directions, and as many first ones of each other kernel."""
    default = kernels.default(problem)
    kinds: dict[Any, list[Choice]] = {}
    for choice in kernels.candidates(problem):
        kinds.setdefault(choice.kernel, []).append(choice)
    found = neighbours(kinds.pop(default.kernel, []), default)[: None if limit is None else limit + 1]
    for choices in kinds.values():
        found += choices if limit is None else choices[: max(1, limit)]
    return found


def neighbours(choices: list[Choice], default: Choice) -> list[Choice]:
    """The default, then in turns the nearest that differs in each one field, in each pair, then the next nearest ..."""
    turns: dict[tuple[int, ...], list[Choice]] = {}
    for choice in sorted(choices, key=lambda choice: _distance(choice.config, default.config)):
        turns.setdefault(_changed(choice.config, default.config), []).append(choice)
    ranked = [
        (len(changed) + turn, -len(changed), changed, choice)
        for changed, group in turns.items()
        for turn, choice in enumerate(group)
    ]
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:-1])]


def _changed(config: Any, default: Any) -> tuple[int, ...]:
    """Places of the fields in which two configurations of one kernel differ."""
    pairs = zip(astuple(config), astuple(default), strict=True)
    return tuple(at for at, (one, other) in enumerate(pairs) if one != other)


def _distance(config: Any, default: Any) -> float:
    """Factors of two between their numbers, and one for everything else in which they differ."""
    total = 0.0
    for one, other in zip(astuple(config), astuple(default), strict=True):
        if one != other:
            numbers = type(one) is int and type(other) is int and one > 0 and other > 0
            total += abs(math.log2(one / other)) if numbers else 1.0
    return total


def measure_gpu(
    problem: Problem,
    device: torch.device,
    limit: int | None = NEIGHBOURS,
    rounds: int = 20,
    others: Callable[[Layer], dict[str, Call]] = lambda layer: {},
    attempt: Callable[[str], bool] = lambda name: True,
) -> Measured:
    """Every kernel of the shortlist on one problem, in CUDA graphs, interleaved, L2 cold.

    Args:
        others: contenders of the caller, timed in the same run; they are in `times`, not in `seconds`.
        attempt: told before each contender runs, also in the race; False the first time leaves it out. Each is waited
            for before the next is named, so that what breaks the device is what was named last.

    Raises:
        RuntimeError: a kernel broke the device's context; nothing can run in this process any more.
    """
    if not attempt(f"{problem} {REFERENCE}"):
        return Measured(problem, {}, {REFERENCE: BROKE})
    layer = Layer(problem, device)
    given = others(layer)
    makers: dict[str, Callable[[], Call]] = {name: functools.partial(given.__getitem__, name) for name in given}
    makers.update((choice.name, functools.partial(layer.launch, choice)) for choice in shortlist(problem, limit))
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name, make in makers.items():
        if not attempt(f"{problem} {name}"):
            refused[name] = BROKE
            continue
        try:
            calls[name] = stopwatch.cuda_graph(make()) if device.type == "cuda" else make()
        except Exception as error:  # noqa: BLE001  one kernel the compiler or the device refuses must not end the tuning
            refused[name] = f"{type(error).__name__}: {error}"
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the context is broken
    times = _race(calls, set(given), device, rounds, lambda name: attempt(f"{problem} {name}"))
    seconds = {name: one.median for name, one in times.items() if name not in given}
    return Measured(problem, seconds, refused, times)


def _race(
    calls: dict[str, Call], own: set[str], device: torch.device, rounds: int, before: Callable[[str], object]
) -> dict[str, Times]:
    """Times of all; where there are many, a short heat first and the finalists (and `own`) again, carefully."""
    clock = functools.partial(stopwatch.interleave, device=device, cold_l2=device.type == "cuda", before=before)
    times: dict[str, Times] = {}
    if len(calls) > 2 * FINALISTS:
        times = clock(calls, rounds=3, warmup=0.002)
        finalists = sorted((name for name in calls if name not in own), key=lambda name: times[name].median)[:FINALISTS]
        calls = {name: call for name, call in calls.items() if name in own or name in finalists}
    return {**times, **clock(calls, rounds=rounds, warmup=0.02)}


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """Problems brought to their batch bucket, each once, in order."""
    return list(dict.fromkeys(replace(problem, batch=tuning_table.bucket(problem.batch)) for problem in problems))


@dataclass
class Tuning:
    """What a run of `tune` did."""

    path: Path
    measured: int = 0
    skipped: int = 0
    left: int = 0  # the time was up
    refused: dict[str, dict[str, str]] = field(default_factory=dict)


def tune(
    problems: Iterable[Problem],
    measure: Callable[[Problem], Measured],
    known: Callable[[Problem, dict[str, float]], bool],
    *,
    device: str,
    seconds: float = float("inf"),
    again: bool = False,
    progress: Callable[[Measured | None], None] = lambda measured: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning:
    """Measure problems and put each into this machine's table at once, so that whatever ends the run keeps it.

    Several processes may measure at a time: none loses the rows of another, and none measures what another has by then.

    Args:
        problems: see `distinct`.
        measure: one problem -> its times. known: whether the times a table holds make measuring needless.
        device: of the problems ("cpu", "cuda").
        seconds: stop before a problem once so much has passed. again: measure what is known, too.
        progress: told of every problem; None for one that was skipped.

    Raises:
        FormatError: the table that is there cannot be read.
    """
    slug = tuning_table.device_slug(device)
    path = tuning_table.user_path(slug)
    table = _read(path, slug)
    result = Tuning(path)
    start = clock()
    todo = distinct(problems)
    for place, problem in enumerate(todo):
        row = tuning_table.key(problem)
        if not again and not known(problem, table.rows.get(row, {})):
            table = _read(path, slug)  # another process may have measured it meanwhile
        if not again and known(problem, table.rows.get(row, {})):
            result.skipped += 1
            progress(None)
            continue
        if clock() - start >= seconds:
            result.left = len(todo) - place
            break
        found = measure(problem)
        if found.seconds:
            tuning_table.add(TuningTable(slug, {row: found.seconds}))
            result.measured += 1
        if found.refused:
            result.refused[row] = found.refused
        progress(found)
    return result


def _read(path: Path, slug: str) -> TuningTable:
    return tuning_table.read(path) if path.exists() else TuningTable(slug)


def known_on_cpu(threads: int) -> Callable[[Problem, dict[str, float]], bool]:
    """For `tune`: a time with so many threads is there, of a named algorithm where several may serve."""

    def known(problem: Problem, times: dict[str, float]) -> bool:
        own = {name for name in times if tuning_table.is_native(name, threads)}
        several = problem.out_channels > 1 and problem.window == Window((3, 3), padding=problem.padding)
        if problem.op == "bitconv2d" and several:  # older tables do not say whose time theirs is
            own.discard(tuning_table.native(threads))
        return bool(own)

    return known


def known_on_gpu(problem: Problem, times: dict[str, float]) -> bool:
    """For `tune`: every family of exact kernels that can serve has a time."""
    reasons = kernels.why_not_by_family(problem)
    able = {family for family in kernels.exact_families() if reasons[family] is None}
    return able <= {tuning_table.family(name) for name in times}
