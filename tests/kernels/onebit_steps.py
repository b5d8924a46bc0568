"""Runs single steps of a program through the one-bit kernels, each on the reference's own inputs.

On "cuda" the kernels run; on "cpu" their source, where `gpu_model.launches_on_the_model` was called. What a step writes
lies between guards of garbage that must stay as they were.
"""

from __future__ import annotations

import torch
from contenders import assert_same
from torch import Tensor

from lbs_kernels.gpu.configs.onebit import OneBitConfig, onebit_candidates, onebit_why_not
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.layout import from_logical, storage, to_logical
from lbs_kernels.gpu.onebit import gemm
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, LinearStep, Program
from lbs_kernels.run.reference import ReferenceRunner

GUARD = 256  # bytes on either side, so that the buffer keeps its alignment


class Guarded:
    """A buffer of garbage inside a larger piece of garbage."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], device: str, seed: int) -> None:
        count = dtype.itemsize * torch.Size(shape).numel()
        generator = torch.Generator().manual_seed(seed)
        garbage = torch.randint(0, 256, (count + 2 * GUARD,), generator=generator, dtype=torch.uint8)
        self.before = garbage
        self.memory = garbage.to(device, copy=True)
        self.tensor = self.memory[GUARD : GUARD + count].view(dtype).view(shape)

    def check_guards(self) -> None:
        now = self.memory.cpu()
        assert torch.equal(now[:GUARD], self.before[:GUARD]), "bytes before the buffer were written"
        assert torch.equal(now[-GUARD:], self.before[-GUARD:]), "bytes after the buffer were written"


def served(program: Program, step: object, batch: int, device: str) -> Problem | None:
    """The step's problem, or None where the one-bit kernels leave it to others."""
    if not isinstance(step, ConvStep | LinearStep):
        return None
    problem = problem_of(step, program, batch, device)
    refused = onebit_why_not(problem) or gemm.step_why_not(step, program.tensors[step.input])
    return None if refused else problem


def bound(
    program: Program,
    arrays: dict[str, Tensor],
    step: ConvStep | LinearStep,
    problem: Problem,
    config: OneBitConfig,
    buffers: dict[int, Tensor],
) -> Launch:
    """The launch of one step on buffers in their GPU form, by tensor index."""
    groups = step.groups if isinstance(step, ConvStep) else 1
    source = program.tensors[step.input]
    weights = gemm.prepare_weights(arrays[step.planes], problem.kernel, groups, source, problem.device, step.w_grid)
    return gemm.bind(step, problem, config, program, arrays, weights, buffers)


def check_steps(
    program: Program,
    blob: Tensor,
    images: list[Tensor],
    device: str = "cpu",
    config: OneBitConfig | None = None,
) -> list[str]:
    """Every step the one-bit kernels serve equals the reference in everything it writes; returns their names."""
    expected: dict[int, Tensor] = {}
    ReferenceRunner(program, blob).run(images, expected)
    arrays = {key: program.array(blob, key).to(device) for key in program.arrays}
    names = []
    for step in program.steps:
        problem = served(program, step, images[0].shape[0], device)
        if problem is None or not isinstance(step, ConvStep | LinearStep):
            continue
        names.append(step.name)
        buffers = {step.input: from_logical(expected[step.input], program.tensors[step.input]).to(device)}
        if step.emit.residual is not None:
            buffers[step.emit.residual] = expected[step.emit.residual].to(device)
        written = [consumer.tensor for consumer in step.emit.consumers]
        written += [] if step.emit.stream is None else [step.emit.stream]
        guarded = {}
        for index in written:
            dtype, shape = storage(program.tensors[index], program.stream_dtype, images[0].shape[0])
            guarded[index] = Guarded(dtype, shape, device, index)
            buffers[index] = guarded[index].tensor
        used = next(onebit_candidates(problem)) if config is None else config
        bound(program, arrays, step, problem, used, buffers)([])
        for index in written:
            actual = to_logical(buffers[index], program.tensors[index])
            assert_same(actual, expected[index], f"{used}: tensor {index} of {step.name}")
            guarded[index].check_guards()
    return names
