"""Which codes below 8 bits a GPU keeps as bytes all the same.

A tensor core multiplies bytes or single bits. Codes of 2 or 4 bits that are kept as planes have to become bytes in
registers, in every step of every loop that reads them, and are packed again by the step that writes them: where a layer
waits for its products that costs more than their size saves. As bytes they are read by csrc/s8 as codes of 8 bits are,
and a network of 4 bits is no slower than one of 8.

A tensor is turned by giving it 8 bits in the program that the GPU runs. Its producer goes on clamping to the levels of
the consumer, so that every code stays what it was; unsigned codes count as q - zero at any width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lbs_kernels.gpu.configs.cost import seconds
from lbs_kernels.gpu.configs.defaults import conv_default, project_defaults, weighted_defaults
from lbs_kernels.gpu.configs.depthwise_project import OP as DEPTHWISE_PROJECT
from lbs_kernels.gpu.configs.stem_pool import OP as STEM_POOL
from lbs_kernels.gpu.configs.stem_pool import stem_pool_default
from lbs_kernels.gpu.layout import BYTE_BITS
from lbs_kernels.gpu.stem import folded_problem
from lbs_kernels.program.planes import accumulator_fits
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, Step, sources

BATCH = 128  # images: weights and activations of few are small, and so is what the choice does to them


def as_kept(program: Program, measured: Callable[[Problem], float | None] = lambda problem: None) -> Program:
    """The program with codes as bytes where its readers together take less time so, on compute capability 9.0.

    Args:
        measured: seconds of a problem, where they are known. Where one reader lacks one, all readers of the tensor
            are modelled: no measured time is added to a modelled one.
    """
    tensors = list(program.tensors)
    for index in _turnable(program):
        readers = [step for step in program.steps if index in sources(step)]
        tensors[index] = replace(program.tensors[index], bits=BYTE_BITS)
        turned = replace(program, tensors=tuple(tensors))
        as_planes, as_bytes = ([problem_of(step, one, BATCH, "cuda") for step in readers] for one in (program, turned))
        known = [measured(problem) for problem in (*as_planes, *as_bytes)]
        times = [time for time in known if time is not None]
        if len(times) < len(known):
            times = [
                _modelled(step, one) for form in (as_planes, as_bytes) for step, one in zip(readers, form, strict=True)
            ]
        if sum(times[: len(readers)]) <= sum(times[len(readers) :]):
            tensors[index] = program.tensors[index]
    return replace(program, tensors=tuple(tensors))


def configurations(step: Step, problem: Problem) -> list[Any]:
    """Of a layer's step on compute capability 9.0, of the kernels that can write what it writes."""
    if problem.op == STEM_POOL:
        return [stem_pool_default(problem)]
    if problem.op == DEPTHWISE_PROJECT:
        return list(project_defaults(problem))
    plain = (step.emit.activation, step.emit.gate) == (None, None)
    return list(weighted_defaults(problem, hopper=True)) if plain else [conv_default(problem)]


def fastest(problem: Problem, hopper: bool = True) -> tuple[Problem, Any]:
    """A layer as a GPU runs it, a stem folded and activations as planes or bytes, and the configuration of the kernel
    that the model finds fastest. Of a step with an activation or a gate that is too little (`configurations`), which a
    problem does not tell.

    hopper: on compute capability 9.0; elsewhere codes keep their form, and Triton serves.
    """
    problem = folded_problem(problem)
    if not hopper:
        return problem, conv_default(problem)
    forms = (problem, replace(problem, a_bits=BYTE_BITS))
    choices = ((form, config) for form in forms for config in weighted_defaults(form, hopper=True))
    return min(choices, key=lambda choice: seconds(*choice))


def _turnable(program: Program) -> list[int]:
    """Unsigned codes below 8 bits that layers alone read, whose sums fit for any byte, and that come from floats."""
    found = []
    for index, spec in enumerate(program.tensors):
        writers = [step for step in program.steps if any(k.tensor == index for k in step.emit.consumers)]
        readers = [step for step in program.steps if index in sources(step)]
        if spec.form != "codes" or spec.bits >= BYTE_BITS or spec.signed or not writers or not readers:
            continue
        (writer,) = writers
        # Maxima and selections of codes hand planes on as they are.
        copies = not _weighted(writer) and any(program.tensors[i].form == "codes" for i in sources(writer))
        if not copies and all(_fits(step, program) for step in readers):
            found.append(index)
    return found


def _weighted(step: Step) -> bool:
    return isinstance(step, ConvStep | LinearStep)


def _fits(step: Step, program: Program) -> bool:
    if not _weighted(step):
        return False
    problem = problem_of(step, program, 1, "cuda")
    return accumulator_fits(problem.reduction, problem.w_bits, BYTE_BITS)


def _modelled(step: Step, problem: Problem) -> float:
    """Seconds by the model."""
    return min(seconds(problem, config) for config in configurations(step, problem))
