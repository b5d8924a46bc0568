"""The Problem a step poses: one key for every back end."""

from __future__ import annotations

from dataclasses import replace

from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, LinearStep, PoolStep, Program, Step


def problem_of(step: Step, program: Program, batch: int, device: str) -> Problem:
    """The key of one step at one batch size.

    A mean is a window of the whole image. The bits of a quantizing step are those of the first codes it writes.
    """
    source = program.tensors[step.input]
    height, width, channels = source.height, source.width, source.channels
    if isinstance(step, ConvStep | LinearStep):
        filters = program.arrays[step.planes].shape[1]
        problem = Problem(step.op, batch, height, width, channels, filters, w_bits=step.w_bits, device=device)
        problem = replace(problem, a_bits=source.bits)
        if isinstance(step, LinearStep):
            return problem
        return replace(
            problem,
            kernel=step.kernel,
            stride=step.stride,
            padding=step.padding,
            dilation=step.dilation,
            groups=step.groups,
        )
    problem = Problem(step.op, batch, height, width, channels, channels, w_bits=0, a_bits=source.bits, device=device)
    if not isinstance(step, PoolStep):
        return replace(problem, a_bits=step.emit.consumers[0].bits if step.emit.consumers else 0)
    if step.kind == "mean":
        return replace(problem, kernel=(height, width), padding=step.padding)
    return replace(problem, kernel=step.kernel, stride=step.stride, padding=step.padding)
