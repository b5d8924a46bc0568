"""Times of a GPU that is not there: what `times.table` measures, by the model of `configs/cost.py`.

A budget of latency can be searched with them. Whatever shows such a time names it modelled, and no tuning table holds
one: they are no measurement, and where the GPU is at hand `lbs tune` replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.gpu.configs.cost import H200, Machine, seconds
from lbs_kernels.gpu.depthwise_project import pairs, projected
from lbs_kernels.gpu.forms import BATCH, WEIGHTED, as_kept, configurations, fastest, step_seconds
from lbs_kernels.gpu.stem import fold_steps
from lbs_kernels.gpu.stem_pool import pool_stems
from lbs_kernels.program.planes import MAX_BITS
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, Program, Step

PREFIX = "modelled:"
MACHINES = {machine.name: machine for machine in (H200,)}


@dataclass(frozen=True)
class Modelled:
    """Seconds by the model, with the interface of the measured table: `estimate(problem)`.

    batch: images that run together. Seconds are those of one of them: at 1 launches are most of it, bits and filters
    little.
    """

    machine: Machine = H200
    batch: int = 1

    def __str__(self) -> str:
        return f"{PREFIX}{self.machine.name}" + (f":{self.batch}" if self.batch > 1 else "")

    @property
    def modelled(self) -> str:
        """What to say beside a time: "modelled, nvidia-h200, batch 128"."""
        return f"modelled, {self.machine.name}, batch {self.batch}"

    def estimate(self, problem: Problem, threads: int | None = None) -> float | None:
        """Seconds of a layer, for each image; None for one that is no step with codes of 1 to 8 bits.

        threads: of the interface; a GPU has none.
        """
        bits = (problem.w_bits, problem.a_bits)
        if problem.op not in WEIGHTED or not all(1 <= width <= MAX_BITS for width in bits):
            return None
        problem = replace(problem, batch=problem.batch * self.batch, device="cuda")
        return seconds(*fastest(problem), self.machine) / self.batch

    def of_steps(self, program: Program) -> list[float]:
        """Seconds of every step of a program for the whole batch, by the bytes that its tensors have on a GPU; 0 of one
        that another step takes in.
        """
        kept = with_projected(as_kept(with_pooled_stem(fold_steps(program))))
        found = {step.name: self.of_step(step, kept) for step in kept.steps}
        return [found.get(step.name, 0.0) for step in program.steps]

    def of_step(self, step: Step, program: Program, hopper: bool = True) -> float:
        """Seconds of one step of a program as a GPU runs it, for the whole batch.

        hopper: on compute capability 9.0, with the kernels in CUDA.
        """
        return step_seconds(step, program, self.batch, self.machine, hopper)


def _unknown(problem: Problem) -> float | None:
    return None


def with_pooled_stem(
    program: Program,
    blob: Tensor | None = None,
    hopper: bool = True,
    measured: Callable[[Problem], float | None] = _unknown,
) -> Program:
    """The program with a stem and the maximum behind it as one step, where that takes less time, with the
    forms of codes that either allows (`as_kept`): a maximum of codes hands them on as they are.

    Args:
        blob: as `pool_stems` takes it. hopper: as `of_step` takes it.
        measured: seconds of a problem, where they are known. Where one of the three steps lacks one, all are modelled.
    """
    one = pool_stems(program, blob)
    if one is program:
        return program
    both = (as_kept(one, measured), as_kept(program, measured)) if hopper else (one, program)
    return one if _faster(*both, hopper, measured) is both[0] else program


def with_projected(
    program: Program, hopper: bool = True, measured: Callable[[Problem], float | None] = _unknown
) -> Program:
    """The program with depthwise layers and the 1 x 1 layers behind them as one step each, where that takes less time.
    On compute capability 9.0: elsewhere codes between the two move between threads (docs/triton.md).

    hopper, measured: as `with_pooled_stem` takes them.
    """
    for first, layer in pairs(program):
        one = _with_pair(program, first, layer)
        program = program if one is program else _faster(one, program, hopper, measured)
    return program


def _with_pair(program: Program, first: ConvStep, layer: ConvStep) -> Program:
    """The program with these two steps as one, and as it is where registers hold no tile of the filters."""
    one = projected(program, first, layer)
    (step,) = (step for step in one.steps if step.name == first.name)
    return one if configurations(step, problem_of(step, one, BATCH, "cuda")) else program


def _faster(one: Program, other: Program, hopper: bool, measured: Callable[[Problem], float | None]) -> Program:
    """The one whose steps take less time together; `other` where they take as much. By times where all steps that
    differ, in what they do or in the form of their codes, have one.
    """
    model, both = Modelled(batch=BATCH), (one, other)
    steps = [[(step, problem_of(step, own, BATCH, "cuda")) for step in own.steps] for own in both]
    differ = [[row for row in way if row not in beside] for way, beside in (steps, steps[::-1])]
    known = [[measured(problem) for _, problem in way] for way in differ]
    times = [sum(time for time in way if time is not None) for way in known]
    if None in (*known[0], *known[1]):
        times = [sum(model.of_step(step, own, hopper) for step in own.steps) for own in both]
    return one if times[0] < times[1] else other


def ways(program: Program) -> list[Program]:
    """The program, and as a GPU may run it: with its stem folded and codes as bytes or nibbles, and with every pair of
    steps as one that there is a kernel for. What is measured of all of them decides.
    """
    kept = as_kept(fold_steps(program))
    one = pool_stems(kept)
    for first, layer in pairs(one):
        one = _with_pair(one, first, layer)
    return [program, kept, one]


def modelled(text: str) -> Modelled | None:
    """The model that prints as `text`, None for a text that does not ask for one ("cpu", "cuda").

    Raises:
        FormatError: a model that does not exist.

    >>> modelled("modelled:nvidia-h200:128").batch, modelled("cuda")
    (128, None)
    """
    if not text.startswith(PREFIX):
        return None
    name, _, batch = text.removeprefix(PREFIX).partition(":")
    if name not in MACHINES or (batch and not (batch.isdecimal() and int(batch))):
        known = ", ".join(f"{PREFIX}{known}" for known in MACHINES)
        raise FormatError(f"{text!r} is no modelled GPU; there is {known}, with a batch behind it such as :128")
    return Modelled(MACHINES[name], int(batch or 1))
