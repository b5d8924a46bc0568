"""Launch configuration of the implicit GEMM of bitconv2d and bitlinear, and when it is legal. Needs no Triton."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from lbs_kernels.errors import FormatError
from lbs_kernels.format import WORD, words
from lbs_kernels.problem import Problem

# Per thread, of its 255 registers: the next power of two of any spills with ptxas 12.8 on sm_80 or sm_90a at some bits.
ACCUMULATORS = 64
OPERANDS = 96  # activations and weights unpacked per step: 64 of one and 32 of the other
WEIGHTS_OF_8_BITS = 32  # eight planes are held while they are unpacked
SHARED_BYTES = 96 * 1024  # of the 99 KiB one block may use on sm_86, sm_89 and sm_120; sm_80 and sm_90 have more


@dataclass(frozen=True)
class GemmConfig:
    """One way to launch the kernel. A tile is `block_m` output pixels by `block_o` filters."""

    block_m: int
    block_o: int
    block_words: int  # 32-channel words per step of the reduction
    warps: int
    stages: int
    weights_first: bool  # acc^T = W X^T: weights are operand A of the tensor core, else activations are

    def __str__(self) -> str:
        order = "wx" if self.weights_first else "xw"
        return f"m{self.block_m}_o{self.block_o}_k{WORD * self.block_words}_w{self.warps}_s{self.stages}_{order}"

    @classmethod
    def parse(cls, text: str) -> GemmConfig:
        """The inverse of `str`. Raises FormatError for other text."""
        found = re.fullmatch(r"m(\d+)_o(\d+)_k(\d+)_w(\d+)_s(\d+)_(wx|xw)", text)
        if found is None:
            raise FormatError(f"{text!r} is no configuration of the GEMM; expected one like m64_o32_k64_w4_s3_wx")
        block_m, block_o, block_k, warps, stages = (int(found[index]) for index in range(1, 6))
        return cls(block_m, block_o, block_k // WORD, warps, stages, found[6] == "wx")


def invalid_reason(config: GemmConfig, problem: Problem) -> str | None:
    """Why `config` cannot run `problem`, or None. The one place where the rule is stated.

    - blocks are powers of two, pixels and filters at least 16 (a tensor-core fragment);
    - a tile of filters holds whole words of 32 channels, or all filters there are: planes are written word by word;
    - accumulator and unpacked operands fit the registers, and both operands of every stage fit shared memory;
    - 4 or 8 warps (a Hopper warp group has 4), with at least one 16 x 8 fragment each.
    """
    sizes = (config.block_m, config.block_o, config.block_words, config.warps)
    if any(size < 1 or size & (size - 1) for size in sizes):
        return f"{config}: blocks and warps are powers of two"
    if config.block_m < 16 or config.block_o < 16:
        return f"{config}: a tensor-core fragment has 16 rows, use blocks of at least 16"
    if config.block_o % WORD and config.block_o < problem.out_channels:
        return f"{config}: {problem.out_channels} filters in blocks of {config.block_o} would share words of {WORD}"
    if config.warps not in (4, 8) or not 1 <= config.stages <= 5:
        return f"{config}: use 4 or 8 warps and 1 to 5 stages"
    tile = config.block_m * config.block_o
    if tile < 16 * 8 * config.warps:
        return f"{config}: {config.warps} warps for a tile of {config.block_m} x {config.block_o}, some would idle"
    if tile > ACCUMULATORS * 32 * config.warps:
        return f"{config}: {tile // (32 * config.warps)} accumulators per thread; at most {ACCUMULATORS} do not spill"
    activations, weights = (config.block_words * block // config.warps for block in (config.block_m, config.block_o))
    if activations + weights > OPERANDS:
        return f"{config}: {activations} + {weights} operands per thread and step; at most {OPERANDS} do not spill"
    if problem.w_bits == 8 and weights > WEIGHTS_OF_8_BITS:
        return f"{config}: {weights} 8-bit weights per thread and step; at most {WEIGHTS_OF_8_BITS} do not spill"
    shared = config.stages * WORD * config.block_words * (config.block_m + config.block_o)
    if shared > SHARED_BYTES:
        return f"{config}: operands take {shared} bytes of shared memory; at most {SHARED_BYTES}"
    return None


def is_valid(config: GemmConfig, problem: Problem) -> bool:
    """Whether `config` can run `problem`; `invalid_reason` says why not."""
    return invalid_reason(config, problem) is None


def gemm_candidates(problem: Problem) -> Iterator[GemmConfig]:
    """Valid configurations worth timing: no tile twice as large as the problem, no word block beyond its channels."""
    rows = problem.batch * problem.out_height * problem.out_width
    if problem.groups > 1:
        yield from _grouped_candidates(problem)
        return
    for block_m, block_o, block_words in product((16, 32, 64, 128, 256), (16, 32, 64, 128), (1, 2, 4)):
        wasteful = (
            (block_m > 16 and block_m >= 2 * rows)
            or (block_o > 16 and block_o >= 2 * problem.out_channels)
            or (block_words > 1 and block_words >= 2 * words(problem.in_channels))
        )
        if wasteful:
            continue
        for warps, stages, weights_first in product((4, 8), (2, 3, 4), (True, False)):
            config = GemmConfig(block_m, block_o, block_words, warps, stages, weights_first)
            if is_valid(config, problem):
                yield config


def _grouped_candidates(problem: Problem) -> Iterator[GemmConfig]:
    """The direct kernel of grouped convolutions has one element of the tile per product and no word blocks."""
    for block_m, warps in product((16, 32, 64), (4, 8)):
        config = GemmConfig(block_m, _power_at_least(problem.out_channels, 16, 32), 1, warps, 2, weights_first=False)
        if is_valid(config, problem):
            yield config


def _power_at_least(size: int, smallest: int, largest: int) -> int:
    power = smallest
    while power < size and power < largest:
        power *= 2
    return power


def gemm_default(problem: Problem) -> GemmConfig:
    """The configuration where nothing was measured: a rule of thumb, not a result.

    One tile covers up to 64 filters; pixels fill the rest, fewer where the whole problem would not occupy 128 blocks.
    """
    if problem.groups > 1:
        return next(_grouped_candidates(problem))
    rows = problem.batch * problem.out_height * problem.out_width
    block_o = _power_at_least(problem.out_channels, 16, 64)
    blocks = -(-problem.out_channels // block_o)
    block_m = 128
    while block_m > 32 and -(-rows // block_m) * blocks < 128:
        block_m //= 2
    block_words = _power_at_least(words(problem.in_channels), 1, 2)
    return GemmConfig(block_m, block_o, block_words, warps=4, stages=3, weights_first=block_o >= 64)
