"""Steps of a program and layers of known networks compiled ahead of time, and what is asked of every kernel.

launches(program, blob, batch)                  # made without a GPU, to be compiled only
kernel = compile_problem(problem, "sm_90", folder)
check_gemm(kernel, "wgmma")
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import programs
import torch
from ahead_of_time import Compiled, compiling
from disassembly import SPLIT, SUM, neighbours_in_a_thread, packed_layouts, ptx_loop

import lbs.cost
import lbs.models
from lbs_kernels.gpu import runner
from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import IMAGE_DTYPES, Program

INT8 = {
    "mma.sync": r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32",
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
}
BATCHES = (1, 32, 128, 256)


def launches(
    program: Program, blob: torch.Tensor, batch: int, configs: dict[str, Any] | None = None
) -> list[Callable[[list[torch.Tensor]], object]]:
    """The launches of a program on CPU tensors although nothing is interpreted: they can be compiled, not run."""
    with mock.patch.object(runner, "INTERPRETED", mock.Mock(value=True)):
        return list(GpuRunner(program, blob, "cpu", configs).plan(batch).launches)


def compile_steps(
    program: Program,
    blob: torch.Tensor,
    batch: int,
    target: str,
    folder: Path,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Compiled]:
    """Every launch of the program at one batch size, compiled."""
    images = []
    for spec in (program.tensors[index] for index in program.inputs):
        image = torch.empty(batch, spec.channels, spec.height, spec.width, dtype=IMAGE_DTYPES[spec.dtype])
        images.append(image.contiguous(memory_format=layout))
    steps = launches(program, blob, batch)
    with compiling(target, folder) as kernels:
        for launch in steps:
            launch(images)
    assert len(kernels) == len(program.steps)
    return kernels


def square(channels: int, filters: int, size: int, kernel: int, batch: int, w_bits: int, a_bits: int) -> Problem:
    """A convolution that keeps the size of its image."""
    window, padding = (kernel, kernel), (kernel // 2, kernel // 2)
    return Problem(
        "bitconv2d", batch, size, size, channels, filters, window, padding=padding, w_bits=w_bits, a_bits=a_bits
    )


def compile_problem(problem: Problem, target: str, folder: Path, config: Any = None) -> Compiled:
    """The launch of one layer that writes a stream and codes of as many bits as it reads."""
    program, blob = programs.one_conv(
        0, channels=problem.in_channels, filters=problem.out_channels, size=(problem.height, problem.width),
        w_bits=problem.w_bits, a_bits=problem.a_bits, out_bits=problem.a_bits, kernel=problem.kernel,
        stride=problem.stride, padding=problem.padding, groups=problem.groups,
    )  # fmt: skip
    _, launch = launches(program, blob, problem.batch, config and {"step1": config})
    with compiling(target, folder) as kernels:
        launch([])  # it reads what the step before wrote
    (kernel,) = kernels
    return kernel


def check_order(kernel: Compiled, target: str) -> None:
    """On sm_90 nothing is read or written in front of the wait for the kernels before; sm_80 has no such wait."""
    before, wait, _ = kernel.ptx.partition("griddepcontrol.wait")
    assert bool(wait) == (target == "sm_90"), kernel.name
    if wait:
        assert "griddepcontrol.launch_dependents" in before
        assert not re.search(r"\b(ld|st|atom|red)\.global|cp\.async", before), kernel.name
        assert not re.search(r"\b(LDG|STG|LDGSTS|ATOMG?)\b", kernel.sass.partition("ACQBULK")[0]), kernel.name


def check_exact(kernel: Compiled) -> None:
    """No spills, no flush of small numbers to zero."""
    assert kernel.spill_bytes == 0, f"{kernel.name} spills {kernel.spill_bytes} bytes: {kernel.log}"
    assert ".ftz" not in kernel.ptx, f"{kernel.name} takes small numbers for zero"


def check_gemm(kernel: Compiled, instruction: str) -> None:
    assert re.search(INT8[instruction], kernel.ptx), f"no {instruction} with int8 operands in {kernel.name}"
    check_exact(kernel)


def check_layouts(kernel: Compiled) -> None:
    """What assembly takes for neighbours are neighbours."""
    for assembly, dimensions in ((SPLIT, 2), (SUM, 1)):
        for layout in packed_layouts(kernel, assembly):
            assert neighbours_in_a_thread(layout, dimensions), f"{kernel.name}: {layout}"


def check_operands(kernel: Compiled) -> None:
    """As `check_layouts`, and no operand moves through shared memory byte by byte."""
    check_layouts(kernel)
    moved = bytes_moved(kernel)
    assert moved == 0, f"{kernel.name} moves bytes through shared memory by {moved} instructions of its loop"


def bytes_moved(kernel: Compiled) -> int:
    """Instructions of the main loop that take single bytes to or from shared memory.

    In PTX, as ptxas makes no byte of a word: of 66 kernels it was the 19 whose machine code has such instructions.
    """
    return ptx_loop(kernel).count(r"(st|ld)\.shared\S*\.[bus]8\b")


@functools.cache
def convolutions(network: str) -> tuple[Problem, ...]:
    """The distinct layers of a network, at batch 1."""
    layers = lbs.cost.network_layers(lbs.models.create(network), lbs.models.example(network)).layers
    return tuple(dict.fromkeys(replace(layer.problem, op="bitconv2d", batch=1) for layer in layers))


def shipped(networks: Iterable[str], bits: Iterable[tuple[int, int]], windows: bool = True) -> dict[str, Problem]:
    """One layer for every kernel that the defaults choose over the layers of known networks, by the kernel's name.

    Two parts of a reduction stand for any number: it is a constant of the kernel. Without `windows`, one layer for
    every configuration: of kernels that differ in their window alone, the one with the most to do.
    """
    found: dict[str, Problem] = {}
    for network in networks:
        for layer, batch, (w_bits, a_bits) in itertools.product(convolutions(network), BATCHES, bits):
            problem = replace(layer, batch=batch, w_bits=w_bits, a_bits=a_bits)
            config = conv_default(problem)
            if isinstance(config, GemmConfig):
                config = replace(config, split_k=min(config.split_k, 2))
            tail = "tail" if problem.in_channels % 32 else "whole"
            window = f"-k{problem.kernel[0]}-p{problem.padding[0]}-{tail}" if windows else ""
            name = f"{config}-w{w_bits}a{a_bits}{window}"
            if name not in found or work(problem) > work(found[name]):
                found[name] = problem
    return found


def work(problem: Problem) -> tuple[tuple[int, int], bool]:
    """What a window adds to a kernel: taps to count, and channels to mask."""
    return problem.kernel, problem.in_channels % 32 > 0


def check_shipped(layer: Problem, target: str, folder: Path) -> None:
    """The kernel that the defaults choose for a layer: the tensor-core instruction it must use, no spill, no detour."""
    config = conv_default(layer)
    kernel = compile_problem(layer, target, folder)
    if not isinstance(config, GemmConfig):
        check_exact(kernel)
        return
    rows = config.block_o if config.weights_first else config.block_m  # of operand A
    wgmma = target == "sm_90" and rows >= 64
    check_gemm(kernel, "wgmma" if wgmma else "mma.sync")
    check_layouts(kernel)
    if wgmma and config.block_m * config.step_words >= 32 * config.warps:
        check_operands(kernel)
