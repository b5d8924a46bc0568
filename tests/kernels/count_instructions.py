"""Prints what one step of the GEMM costs, read from the machine code: the table of docs/triton.md.

python tests/kernels/count_instructions.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from compiled_layers import compile_problem, square
from disassembly import instructions, main_loop

from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.gemm import GemmConfig

LAYERS = {"64->64 3x3": (64, 64, 56, 3), "256->256 3x3": (256, 256, 14, 3), "256->64 1x1": (256, 64, 56, 1)}
BITS = ((2, 2), (4, 4), (4, 8), (8, 8))
BATCH = 128
PRODUCTS = {"sm_90": 4096, "sm_80": 2048}  # int8 products per clock of a multiprocessor at best


def main() -> None:
    print("target layer bits config | loop, per product, loop / tensor core, other instructions, registers")
    for target, clock in PRODUCTS.items():
        for name, (channels, filters, size, kernel) in LAYERS.items():
            for w_bits, a_bits in BITS:
                problem = square(channels, filters, size, kernel, BATCH, w_bits, a_bits)
                config = conv_default(problem)
                assert isinstance(config, GemmConfig)
                with tempfile.TemporaryDirectory() as folder:
                    result = compile_problem(problem, target, Path(folder))
                loop = main_loop(result)
                length = len(loop.instructions)
                taps = kernel * kernel
                idle = -(-taps // config.block_taps) * config.block_taps / taps  # what lies behind the window counts
                clocks = config.block_m * config.block_o * 32 * config.step_words / clock
                print(
                    f"{target} | {name} | w{w_bits}a{a_bits} | {config} | {length} | {length / loop.products:.1f} | "
                    f"{length * config.warps / 4 / clocks * idle:.2f} | {len(instructions(result)) - length} | "
                    f"{result.registers}"
                )


if __name__ == "__main__":
    main()
