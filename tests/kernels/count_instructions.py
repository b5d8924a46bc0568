"""Prints what one step of the GEMM costs, read from the machine code: the table of docs/triton.md.

python tests/kernels/count_instructions.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import programs
import torch
from ahead_of_time import Compiled, compiling
from disassembly import instructions, main_loop

from lbs_kernels import gpu_runner
from lbs_kernels.bitconv2d import tuning
from lbs_kernels.gemm_config import GemmConfig
from lbs_kernels.gpu_runner import GpuRunner
from lbs_kernels.problem import Problem

LAYERS = {"64->64 3x3": (64, 64, 56, 3), "256->256 3x3": (256, 256, 14, 3), "256->64 1x1": (256, 64, 56, 1)}
BITS = ((2, 2), (4, 4), (4, 8), (8, 8))
BATCH = 128
PRODUCTS = {"sm_90": 4096, "sm_80": 2048}  # int8 products per clock of a multiprocessor at best


def compiled(problem: Problem, target: str) -> Compiled:
    """The layer's launch, writing codes of as many bits as it reads and a stream."""
    program, blob = programs.one_conv(
        0, channels=problem.in_channels, filters=problem.out_channels, size=(problem.height, problem.width),
        w_bits=problem.w_bits, a_bits=problem.a_bits, out_bits=problem.a_bits, kernel=problem.kernel,
        padding=problem.padding,
    )  # fmt: skip
    with mock.patch.object(gpu_runner, "INTERPRETED", mock.Mock(value=True)):
        launch = GpuRunner(program, blob, "cpu").plan(problem.batch).launches[1]
    with tempfile.TemporaryDirectory() as folder, compiling(target, Path(folder)) as kernels:
        launch([torch.empty(problem.batch, problem.in_channels, 1, 1)])
    return kernels[0]


def main() -> None:
    print("target layer bits config | loop, per product, loop / tensor core, other instructions, registers")
    for target, clock in PRODUCTS.items():
        for name, (channels, filters, size, kernel) in LAYERS.items():
            for w_bits, a_bits in BITS:
                problem = Problem(
                    "bitconv2d", BATCH, size, size, channels, filters, (kernel, kernel),
                    padding=(kernel // 2, kernel // 2), w_bits=w_bits, a_bits=a_bits,
                )  # fmt: skip
                config = tuning.default(problem)
                assert isinstance(config, GemmConfig)
                result = compiled(problem, target)
                loop = main_loop(result)
                length = len(loop.instructions)
                clocks = config.block_m * config.block_o * 32 * config.block_words / clock
                print(
                    f"{target} | {name} | w{w_bits}a{a_bits} | {config} | {length} | {length / loop.products:.1f} | "
                    f"{length * config.warps / 4 / clocks:.2f} | {len(instructions(result)) - length} | "
                    f"{result.registers}"
                )


if __name__ == "__main__":
    main()
