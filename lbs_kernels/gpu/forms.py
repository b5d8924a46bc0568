"""Which codes below 8 bits a GPU keeps otherwise than as planes.

A tensor core multiplies bytes or single bits. Codes of 2 or 4 bits that are kept as planes have to become bytes in
registers, in every step of every loop that reads them, and are packed again by the step that writes them: where a layer
waits for its products that costs more than their size saves. As bytes they are read by csrc/s8 as codes of 8 bits are,
and a network of 4 bits is no slower than one of 8; as nibbles they are half as large, which is what layers that wait
for memory gain by, and csrc/s8 expands them as it multiplies (docs/cuda.md).

A tensor is turned into bytes by giving it 8 bits in the program that the GPU runs. Its producer goes on clamping to the
levels of the consumer, so that every code stays what it was; unsigned codes count as q - zero at any width. Nibbles
(`NibbleSpec`) keep the bits they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lbs_kernels.gpu.configs.cost import H200, Machine, seconds, weight_count
from lbs_kernels.gpu.configs.cuda import MAX_CONSUMERS, S8Config
from lbs_kernels.gpu.configs.defaults import DEFAULTS, conv_default, project_defaults, weighted_defaults
from lbs_kernels.gpu.configs.depthwise_project import OP as DEPTHWISE_PROJECT
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, depthwise_defaults, strips_why_not
from lbs_kernels.gpu.configs.stem_pool import OP as STEM_POOL
from lbs_kernels.gpu.configs.stem_pool import stem_pool_default
from lbs_kernels.gpu.layout import BYTE_BITS, NIBBLE_BITS, PITCH, kept, nbytes, read_by, written_by
from lbs_kernels.gpu.stem import folded_problem
from lbs_kernels.program.planes import accumulator_fits
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, LinearStep, NibbleSpec, Program, Step, TensorSpec, sources

WEIGHTED = ("bitconv2d", "bitlinear")
BATCH = 128  # images: weights and activations of few are small, and so is what the choice does to them


def as_kept(program: Program, measured: Callable[[Problem], float | None] = lambda problem: None) -> Program:
    """The program with codes as bytes or nibbles where its steps together take less time so, on compute capability 9.0.

    Args:
        measured: seconds of a problem, where they are known. Forms in which all readers of a tensor have one compete by
            them; where there are fewer than two such forms, the readers and the writer of the tensor are modelled in
            every form: no measured time is added to a modelled one.
    """
    for index, forms in _turnable(program):
        ways = [_with_tensor(program, index, spec) for spec in (program.tensors[index], *forms)]
        known = [(time, one) for one in ways if (time := _known(index, one, measured)) is not None]
        timed = known if len(known) > 1 else [(_modelled(index, one), one) for one in ways]
        program = min(timed, key=lambda way: way[0])[1]
    return program


def step_seconds(step: Step, program: Program, batch: int, machine: Machine = H200, hopper: bool = True) -> float:
    """Modelled seconds of a step by the bytes that its tensors have on a GPU.

    hopper: on compute capability 9.0, with the kernels in CUDA.
    """
    problem = problem_of(step, program, batch, "cuda")
    touched = {*read_by(step), *written_by(step)}
    moved = float(sum(nbytes(program.tensors[index], program.stream_dtype, batch) for index in touched))
    if not _weighted(step):
        return min(seconds(problem, config, machine, moved) for config in DEFAULTS[step.op](problem))
    everywhere = [conv_default(problem)] if step.op in WEIGHTED else [*DEFAULTS[step.op](problem)]
    chosen = configurations(step, problem) if hopper or problem.depthwise else everywhere
    moved += weight_count(problem) * problem.w_bits / 8
    return min(seconds(problem, config, machine, moved) for config in chosen if _serves(step, config, program))


def configurations(step: Step, problem: Problem) -> list[Any]:
    """Of a layer's step on compute capability 9.0, of the kernels whose epilogue has what it has."""
    if problem.op == STEM_POOL:
        return [stem_pool_default(problem)]
    if problem.op == DEPTHWISE_PROJECT:
        return list(project_defaults(problem))
    if problem.depthwise:
        return list(depthwise_defaults(problem))
    return list(weighted_defaults(problem, hopper=True)) if _plain(step) else [conv_default(problem)]


def fastest(problem: Problem, hopper: bool = True) -> tuple[Problem, Any]:
    """A layer as a GPU runs it, a stem folded and activations as planes, bytes or nibbles, and the configuration of the
    kernel that the model finds fastest. Of a step with an activation or a gate that is too little (`configurations`),
    which a problem does not tell.

    hopper: on compute capability 9.0; elsewhere codes keep their form, and Triton serves.
    """
    problem = folded_problem(problem)
    if not hopper:
        return problem, conv_default(problem)
    choices = ((form, config) for form in every_form(problem) for config in weighted_defaults(form, hopper=True))
    return min(choices, key=lambda choice: seconds(*choice))


def every_form(problem: Problem) -> list[Problem]:
    """A problem, and of a layer with codes below 8 bits the same with bytes and nibbles, where they may be."""
    if problem.op not in WEIGHTED or not 0 < problem.a_bits < BYTE_BITS:
        return [problem]
    fits = accumulator_fits(problem.reduction, problem.w_bits, BYTE_BITS)
    return [problem, *([replace(problem, a_bits=BYTE_BITS)] if fits else []), *nibble_form(problem)]


def nibble_form(problem: Problem) -> list[Problem]:
    """A layer that reads nibbles where it can and they are smaller than bytes; else nothing."""
    odd = problem.w_bits == BYTE_BITS and problem.grid == "odd"
    able = problem.groups == 1 and problem.a_bits <= NIBBLE_BITS and problem.in_channels > PITCH and not odd
    return [replace(problem, nibbles=True)] if able else []


def _turnable(program: Program) -> Iterator[tuple[int, list[TensorSpec]]]:
    """Codes below 8 bits that layers alone read and that come from floats, with the other forms they may have: bytes
    where they are unsigned and the sums fit for any byte, nibbles where every reader takes them.
    """
    for index, spec in enumerate(program.tensors):
        writers = [step for step in program.steps if any(k.tensor == index for k in step.emit.consumers)]
        readers = _readers(index, program)
        if spec.form != "codes" or spec.bits >= BYTE_BITS or not writers or not readers:
            continue
        (writer,) = writers
        # Maxima and selections of codes hand planes on as they are.
        copies = not _weighted(writer) and any(program.tensors[i].form == "codes" for i in sources(writer))
        if copies or not all(map(_weighted, readers)):
            continue
        forms = []
        if not spec.signed and all(_fits(step, program) for step in readers):
            forms.append(replace(spec, bits=BYTE_BITS))
        if all(_plain(step) and nibble_form(_gridded(step, program)) for step in readers):
            forms.append(NibbleSpec(**vars(spec)))
        if forms:
            yield index, forms


def _readers(index: int, program: Program) -> list[Step]:
    return [step for step in program.steps if index in sources(step)]


def _with_tensor(program: Program, index: int, spec: TensorSpec) -> Program:
    return replace(program, tensors=(*program.tensors[:index], spec, *program.tensors[index + 1 :]))


def _weighted(step: Step) -> bool:
    return isinstance(step, ConvStep | LinearStep)


def _serves(step: Step, config: Any, program: Program) -> bool:
    """Whether a configuration can run a step, beyond what its problem says."""
    if isinstance(config, S8Config):
        return all(config.writes(kept(program.tensors[consumer.tensor])) for consumer in step.emit.consumers)
    if isinstance(config, DepthwiseConfig) and isinstance(step, ConvStep | LinearStep):
        return strips_why_not(step, config, program) is None
    return True


def _plain(step: Step) -> bool:
    """Whether the epilogue of the kernels in CUDA has all that the step's has."""
    emit = step.emit
    return (emit.activation, emit.gate) == (None, None) and len(emit.consumers) <= MAX_CONSUMERS


def _fits(step: Step, program: Program) -> bool:
    problem = problem_of(step, program, 1, "cuda")
    return accumulator_fits(problem.reduction, problem.w_bits, BYTE_BITS)


def _gridded(step: Step, program: Program) -> Problem:
    """The problem of a layer with the grid of its weights."""
    assert isinstance(step, ConvStep | LinearStep)
    return replace(problem_of(step, program, 1, "cuda"), grid=step.w_grid)


def _known(index: int, program: Program, measured: Callable[[Problem], float | None]) -> float | None:
    """Measured seconds of the readers of a tensor, None where one lacks them."""
    times = [measured(problem_of(step, program, BATCH, "cuda")) for step in _readers(index, program)]
    return sum(time for time in times if time is not None) if None not in times else None


def _modelled(index: int, program: Program) -> float:
    """Seconds of the readers and the writer of a tensor by the model."""
    steps = [step for step in program.steps if index in (*sources(step), *written_by(step))]
    return sum(step_seconds(step, program, BATCH) for step in steps)
