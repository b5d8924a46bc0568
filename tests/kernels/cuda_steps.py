"""Runs single steps of a program through the CUDA kernels, each on the reference's own inputs.

On "cuda" the kernels run; on "cpu" their source, where `gpu_model.launches_on_the_model` was called. What a step writes
lies between guards of garbage that must stay as they were.
"""

from __future__ import annotations

from typing import Any

import programs
import torch
from contenders import assert_same
from torch import Tensor

from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.cuda import CudaConfig, OneBitConfig
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.layout import BYTE_BITS, from_logical, nibble_pitch, storage, to_logical
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, TensorSpec
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times import graph

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


def module_of(kind: type[CudaConfig]) -> Any:
    """The module that binds steps to the kernels of `kind`."""
    return kernels.kernel_of(kind(*kind.tiles[0])).implementation("bitconv2d")


def served(
    program: Program, step: object, batch: int, device: str, kind: type[CudaConfig] = OneBitConfig
) -> Problem | None:
    """The step's problem, or None where the kernels of `kind` leave it to others."""
    if not isinstance(step, ConvStep | LinearStep):
        return None
    problem = problem_of(step, program, batch, device)
    row = kernels.kernel_of(kind(*kind.tiles[0]))
    refused = row.why_none(problem) or module_of(kind).step_why_not(step, program.tensors[step.input])
    return None if refused else problem


def input_buffer(codes: Tensor, spec: TensorSpec, device: str) -> Tensor:
    """Codes in their GPU form; bytes and nibbles beyond the last channel hold garbage."""
    if spec.nibbles:
        rest = (*codes.shape[:-1], 8 * nibble_pitch(spec.channels) - spec.channels)
        codes = torch.cat([codes, torch.randint(0, 16, rest, dtype=torch.uint8)], dim=-1)
    buffer = from_logical(codes, spec).contiguous()
    if spec.bits == BYTE_BITS:
        rest = buffer[..., spec.channels :]
        rest.copy_(torch.randint(-128, 128, rest.shape, dtype=torch.int8))
    return buffer.to(device)


def bound(
    program: Program,
    arrays: dict[str, Tensor],
    step: ConvStep | LinearStep,
    problem: Problem,
    config: CudaConfig,
    buffers: dict[int, Tensor],
) -> Launch:
    """The launch of one step on buffers in their GPU form, by tensor index."""
    kernel, groups = (step.kernel, step.groups) if isinstance(step, ConvStep) else ((1, 1), 1)
    module = module_of(type(config))
    source = program.tensors[step.input]
    weights = module.prepare_weights(arrays[step.planes], kernel, groups, source, problem.device, step.w_grid)
    launch: Launch = module.bind(step, problem, config, program, arrays, weights, buffers)
    return launch


def check_steps(
    program: Program,
    blob: Tensor,
    images: list[Tensor],
    device: str = "cpu",
    config: CudaConfig | None = None,
    kind: type[CudaConfig] = OneBitConfig,
) -> list[str]:
    """Every step the kernels serve equals the reference in everything it writes; returns their names.

    config: the one that runs, else the first candidate of `kind`.
    """
    kind = kind if config is None else type(config)
    expected: dict[int, Tensor] = {}
    ReferenceRunner(program, blob).run(images, expected)
    arrays = {key: program.array(blob, key).to(device) for key in program.arrays}
    names = []
    for step in program.steps:
        problem = served(program, step, images[0].shape[0], device, kind)
        if problem is None or not isinstance(step, ConvStep | LinearStep):
            continue
        names.append(step.name)
        buffers = {step.input: input_buffer(expected[step.input], program.tensors[step.input], device)}
        if step.emit.residual is not None:
            added = program.tensors[step.emit.residual]
            values = expected[step.emit.residual]
            coded = added.form == "codes"
            buffers[step.emit.residual] = (
                input_buffer(values, added, device) if coded else values.to(device).contiguous()
            )
        written = [consumer.tensor for consumer in step.emit.consumers]
        written += [] if step.emit.stream is None else [step.emit.stream]
        guarded = {}
        for index in written:
            dtype, shape = storage(program.tensors[index], program.stream_dtype, images[0].shape[0])
            guarded[index] = Guarded(dtype, shape, device, index)
            buffers[index] = guarded[index].tensor
        used = next(kind.candidates(problem)) if config is None else config
        bound(program, arrays, step, problem, used, buffers)([])
        for index in written:
            actual = to_logical(buffers[index], program.tensors[index])
            assert_same(actual, expected[index], f"{used}: tensor {index} of {step.name}")
            guarded[index].check_guards()
    return names


def check_replays(runner: Any, program: Program, blob: Tensor, batch: int) -> None:
    """Replays and calls of a runner on a GPU, each of another image; compared when all are done."""
    seeds = range(3)
    images = [programs.random_inputs(program, batch, seed)[0].cuda() for seed in seeds]
    expected = [ReferenceRunner(program, blob).run([image.cpu()])[0] for image in images]
    static = images[0].clone()
    recorded = graph.record(lambda: runner.run([static]), "cuda")
    found = []
    for turn in range(60):
        static.copy_(images[turn % len(seeds)])
        recorded.replay()
        found.append((recorded.result[0].clone(), runner.run([static])[0]))
    for turn, results in enumerate(found):
        for result in results:
            assert_same(result.cpu(), expected[turn % len(seeds)], f"turn {turn}")
