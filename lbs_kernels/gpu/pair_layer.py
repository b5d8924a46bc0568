"""A step that stands for two, as it stands in a network, on random data: what tuning times beside `layer_program`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lbs_kernels.gpu.configs.depthwise_project import OP as DEPTHWISE_PROJECT
from lbs_kernels.gpu.configs.stem_pool import OP as STEM_POOL
from lbs_kernels.gpu.configs.stem_pool import PAD, STEP, TAPS, pooled
from lbs_kernels.gpu.depthwise_project import pairs, projected
from lbs_kernels.gpu.stem import PAIR, fold_stem
from lbs_kernels.gpu.stem_pool import pool_stems
from lbs_kernels.program.layer import RESULT, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Consumer, ConvStep, Emit, PoolStep, Program, Step, TensorSpec, build_blob

OPS = (DEPTHWISE_PROJECT, STEM_POOL)
BEHIND = "behind"  # the name of the second step
STEM = ((7, 7), (2, 2), (3, 3))  # the window that a folded stem was


@dataclass(frozen=True)
class PairLayer:
    """program, blob: the two steps apart, the first of them named `LAYER`. one, one_blob: with the step that stands for
    both, of that name. result: the tensor that either writes last.
    """

    program: Program
    blob: Tensor
    one: Program
    one_blob: Tensor
    result: int


def pair_layer(problem: Problem, seed: int = 0) -> PairLayer:
    """The pair whose step poses `problem`, of one of `OPS`, with codes behind it."""
    if problem.op == STEM_POOL:
        return _stem(problem, seed)
    size = (problem.out_height, problem.out_width)
    first = replace(problem, op=ConvStep.op, out_channels=problem.in_channels, groups=problem.in_channels)
    layer = Problem(ConvStep.op, problem.batch, *size, problem.in_channels, problem.out_channels, w_bits=problem.w_bits)
    (program, blob), (behind, data) = layer_program(first, seed), layer_program(layer, seed + 1)
    arrays = {f"{BEHIND}.{key}": behind.array(data, key) for key in behind.arrays}
    step = next(step for step in behind.steps if isinstance(step, ConvStep))
    planes, multiplier, bias = (f"{BEHIND}.{key}" for key in (step.planes, step.multiplier, step.bias))
    result = len(program.tensors)
    emit = replace(step.emit, consumers=(replace(step.emit.consumers[0], tensor=result),))
    step = replace(step, name=BEHIND, input=RESULT, emit=emit, planes=planes, multiplier=multiplier, bias=bias)
    program, blob = _with(program, blob, step, behind.tensors[RESULT], arrays)
    ((one, other),) = pairs(program)
    return PairLayer(program, blob, projected(program, one, other), blob, result)


def _stem(problem: Problem, seed: int) -> PairLayer:
    """Codes go into the maximum: what is computed in front of it is the same for a stream."""
    size = (PAIR * problem.out_height, PAIR * problem.out_width)
    channels = problem.in_channels // PAIR**2
    first = Problem(
        ConvStep.op, problem.batch, *size, channels, problem.out_channels, *STEM, w_bits=problem.w_bits, grid="zero"
    )
    program, blob = layer_program(first, seed)
    spec, result = program.tensors[RESULT], len(program.tensors)
    sides = ((TAPS, TAPS), (STEP, STEP), (PAD, PAD))
    step = PoolStep(BEHIND, RESULT, Emit(consumers=(Consumer(result, spec.bits, 1.0),)), "max", *sides)
    made = replace(spec, name=BEHIND, height=pooled(spec.height), width=pooled(spec.width))
    program, blob = _with(program, blob, step, made, {})
    one, data = fold_stem(program, blob)
    return PairLayer(program, blob, pool_stems(one, data), data, result)


def _with(
    program: Program, blob: Tensor, step: Step, made: TensorSpec, arrays: dict[str, Tensor]
) -> tuple[Program, Tensor]:
    """The program with a step behind that of the layer, and what it writes."""
    specs, blob, digest = build_blob({key: program.array(blob, key) for key in program.arrays} | arrays)
    place = next(at for at, other in enumerate(program.steps) if RESULT in [c.tensor for c in other.emit.consumers])
    steps = (*program.steps[: place + 1], step, *program.steps[place + 1 :])
    tensors = (*program.tensors, replace(made, name=BEHIND))
    return replace(program, steps=steps, tensors=tensors, arrays=specs, digest=digest), blob
