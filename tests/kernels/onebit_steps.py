"""Runs single steps of a program through the one-bit kernels, each on the reference's own inputs.

On "cuda" the kernels run; on "cpu" their source, where `gpu_model.launches_on_the_model` was called. What a step writes
lies between guards of garbage that must stay as they were.
"""

from __future__ import annotations

import torch
from contenders import assert_same
from torch import Tensor

from lbs_kernels.bitconv2d import cuda_impl as bitconv2d
from lbs_kernels.bitlinear import cuda_impl as bitlinear
from lbs_kernels.gpu.configs.onebit import OneBitConfig, onebit_default
from lbs_kernels.gpu.layout import from_logical, storage, to_logical
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.step_problem import problem_of
from lbs_kernels.program.steps import ConvStep, LinearStep, Program
from lbs_kernels.run.reference import ReferenceRunner

GUARD = 256  # bytes on either side, so that the buffer keeps its alignment
IMPLEMENTATIONS = {"bitconv2d": bitconv2d, "bitlinear": bitlinear}


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
    source, module = program.tensors[step.input], IMPLEMENTATIONS[step.op]
    problem = problem_of(step, program, batch, device)
    refused = module.supports(problem) or module.step_reason(step, source)  # type: ignore[attr-defined]
    return None if refused else problem


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
        source, module = program.tensors[step.input], IMPLEMENTATIONS[step.op]
        buffers = {step.input: from_logical(expected[step.input], source).to(device)}
        if step.emit.residual is not None:
            buffers[step.emit.residual] = expected[step.emit.residual].to(device)
        written = [consumer.tensor for consumer in step.emit.consumers]
        written += [] if step.emit.stream is None else [step.emit.stream]
        guarded = {}
        for index in written:
            dtype, shape = storage(program.tensors[index], program.stream_dtype, images[0].shape[0])
            guarded[index] = Guarded(dtype, shape, device, index)
            buffers[index] = guarded[index].tensor
        groups = step.groups if isinstance(step, ConvStep) else 1
        weights = module.prepare_weights(arrays[step.planes], problem.kernel, groups, source, device)  # type: ignore[attr-defined]
        used = onebit_default(problem) if config is None else config
        module.bind(step, problem, used, program, arrays, weights, buffers)([])  # type: ignore[attr-defined]
        for index in written:
            actual = to_logical(buffers[index], program.tensors[index])
            assert_same(actual, expected[index], f"{used}: tensor {index} of {step.name}")
            guarded[index].check_guards()
    return names
