"""Launch configurations of the convolutions without a tensor core: depthwise and grouped. Needs no Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from lbs_kernels.device import GPUS
from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.program.planes import MAX_BITS, WORD, words
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, LinearStep, Program

BLOCKS = 2 * GPUS["sm_90"].multiprocessors  # with fewer of them some would idle, so tiles shrink
COLUMNS = (8, 7, 4, 2, 1)  # of a strip, the longest first: neighbours share what they read
LANES = 128  # per thread, sums of one tile: with what one group of taps needs beside them, below 255 registers


@dataclass(frozen=True)
class DepthwiseConfig:
    """One way to launch a depthwise kernel. A tile is `block_m` output pixels by `block_c` channels.

    columns: 0, or of bytes under windows of 3 x 3 the columns of a strip, of which a tile has `block_m` then: two rows
    high, one where the window steps by two (gpu/triton/depthwise_columns.py).
    """

    block_m: int
    block_c: int
    warps: int
    columns: int = 0

    def __str__(self) -> str:
        columns = f"_x{self.columns}" if self.columns else ""
        return f"depthwise_m{self.block_m}_c{self.block_c}_w{self.warps}{columns}"

    @classmethod
    def parse(cls, text: str) -> DepthwiseConfig:
        """The configuration that prints as `text`. Raises FormatError."""
        pattern = r"depthwise_m(\d+)_c(\d+)_w(\d+)(?:_x(\d+))?"
        found = match_text(pattern, text, "depthwise kernel", cls(128, 32, 4))
        return cls(*(int(number or 0) for number in found.groups()))

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None: blocks are powers of two, of whole words of 32 channels."""
        if not problem.depthwise:
            return f"{self}: {problem.groups} groups of {problem.in_channels} channels; it needs one for each channel"
        if any(size < 1 or size & (size - 1) for size in (self.block_m, self.block_c, self.warps)):
            return f"{self}: blocks and warps are powers of two"
        if self.block_c < WORD:
            return f"{self}: channels go in words of {WORD}"
        if self.columns:
            return self._columns_why_not(problem)
        if self.warps > 8 or self.block_m * self.block_c > LANES * 32 * self.warps:
            return f"{self}: at most 8 warps, and {LANES} sums for each thread"
        return None

    @property
    def wide(self) -> bool:
        """Whether a thread has 16 channels of a strip, for which registers suffice where bytes alone are written."""
        return self.columns > 0 and self.block_m * self.block_c > 8 * 32 * self.warps

    def _columns_why_not(self, problem: Problem) -> str | None:
        """Bytes, windows of 3 x 3 that step by one or two, padded by at most one; 16 channels for each thread."""
        if problem.a_bits != MAX_BITS:
            return f"{self}: activations of {problem.a_bits} bits are planes; strips of columns are of bytes"
        plain = problem.stride in ((1, 1), (2, 2)) and problem.dilation == (1, 1) and max(problem.padding) <= 1
        if problem.kernel != (3, 3) or not plain:
            return f"{self}: strips of columns serve windows of 3 x 3 that step by 1 or 2, padded by at most 1"
        if self.warps > 8 or self.columns > COLUMNS[0] or self.block_m * self.block_c > 16 * 32 * self.warps:
            return f"{self}: at most 8 warps, {COLUMNS[0]} columns, and 16 channels for each thread"
        return None


def strips_why_not(step: ConvStep | LinearStep, config: DepthwiseConfig, program: Program) -> str | None:
    """Why a configuration of columns cannot run a step, beyond what its problem says; None of any other.

    Strips of columns sum products of bytes alone. With an activation or a gate it was not read whether they spill;
    those of 16 channels a thread do where more than bytes is written (Triton 3.7.1).
    """
    if not config.columns:
        return None
    if program.tensors[step.input].signed or (step.w_bits == MAX_BITS and step.w_grid == "odd"):
        return f"{config}: {step.name} sums more than products of bytes; take columns of 0"
    emit = step.emit
    if (emit.activation, emit.gate) != (None, None):
        return f"{config}: {step.name} has an activation or a gate; take columns of 0"
    alone = emit.stream is None and emit.residual is None and len(emit.consumers) == 1
    plain = alone and emit.consumers[0].pre_scale is None
    if config.wide and not (plain and program.tensors[emit.consumers[0].tensor].bits == MAX_BITS):
        return f"{config}: {step.name} writes more than bytes, which spills; take twice the warps"
    return None


@dataclass(frozen=True)
class GroupedConfig:
    """One way to launch the grouped kernel. A tile is `block_m` output pixels by `block_o` filters."""

    block_m: int
    block_o: int
    warps: int

    def __str__(self) -> str:
        return f"grouped_m{self.block_m}_o{self.block_o}_w{self.warps}"

    @classmethod
    def parse(cls, text: str) -> GroupedConfig:
        """The configuration that prints as `text`. Raises FormatError."""
        found = match_text(r"grouped_m(\d+)_o(\d+)_w(\d+)", text, "grouped kernel", cls(64, 32, 4))
        return cls(*map(int, found.groups()))

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None: powers of two; whole words of filters, or all there are."""
        if problem.groups < 2:
            return f"{self}: one group; take the matrix product"
        if any(size < 1 or size & (size - 1) for size in (self.block_m, self.block_o, self.warps)):
            return f"{self}: blocks and warps are powers of two"
        if self.block_o % WORD and self.block_o < problem.out_channels:
            return f"{self}: {problem.out_channels} filters in blocks of {self.block_o} would share words of {WORD}"
        if self.warps > 8 or self.block_m * self.block_o > 64 * 32 * self.warps:
            return f"{self}: at most 8 warps, and 64 sums for each thread"
        return None


def power_at_least(size: int, smallest: int, largest: int) -> int:
    """The smallest power of two from `smallest` on that is not below `size`, at most `largest`."""
    power = smallest
    while power < size and power < largest:
        power *= 2
    return power


def depthwise_candidates(problem: Problem) -> Iterator[DepthwiseConfig]:
    """Valid configurations worth timing: no tile twice as large as the problem."""
    if not problem.depthwise:
        return
    rows = problem.rows
    for block_m, block_c, warps in product((16, 32, 64, 128, 256), (32, 64, 128), (1, 2, 4, 8)):
        config = DepthwiseConfig(block_m, block_c, warps)
        large = (block_m > 16 and block_m >= 2 * rows) or (block_c > WORD and block_c >= 2 * problem.in_channels)
        idle = block_m * block_c < WORD * 32 * warps  # a thread unpacks whole words
        if not large and not idle and config.why_not(problem) is None:
            yield config
    for columns, block_c, (block_m, warps) in product(COLUMNS, (32, 64), ((64, 4), (128, 8), (64, 8), (16, 1))):
        config = DepthwiseConfig(block_m * WORD // block_c, block_c, warps, columns)
        if columns <= problem.out_width and config.why_not(problem) is None:
            yield config


def column_rows(problem: Problem) -> int:
    """Output rows of a strip: of two whose windows step by one, the four rows below one another fill a register."""
    return 3 - problem.stride[0]


def column_positions(problem: Problem, columns: int) -> int:
    """Strips of the whole batch."""
    lines, strips = -(-problem.out_height // column_rows(problem)), -(-problem.out_width // columns)
    return problem.batch * lines * strips


def depthwise_defaults(problem: Problem) -> list[DepthwiseConfig]:
    """Where nothing was measured: strips of columns where they serve, of 16 channels a thread and then of 8, which
    leave the epilogue registers; last what serves everything.
    """
    chosen = _columns_default(problem)
    strips = [chosen, replace(chosen, warps=2 * chosen.warps)] if chosen.why_not(problem) is None else []
    return [*strips, depthwise_default(problem)]


def _columns_default(problem: Problem) -> DepthwiseConfig:
    """The longest strips that divide a row and keep the multiprocessors at work, else short ones in small blocks."""
    exact = [columns for columns in COLUMNS if problem.out_width % columns == 0]
    for columns, warps in product(exact if exact != [1] else (4, 2, 1), (4, 2, 1)):
        config = DepthwiseConfig(16 * warps, WORD, warps, columns)
        tiles = -(-column_positions(problem, columns) // config.block_m) * words(problem.in_channels)
        if tiles >= BLOCKS:
            return config
    return config


def depthwise_default(problem: Problem) -> DepthwiseConfig:
    """A word of channels and a pixel for each thread, small blocks for small problems."""
    rows = problem.rows
    block_m = power_at_least(rows, 32, 128)
    while block_m > 32 and -(-rows // block_m) * -(-problem.in_channels // WORD) < BLOCKS:
        block_m //= 2
    return DepthwiseConfig(block_m, WORD, warps=block_m // 32)


def grouped_candidates(problem: Problem) -> Iterator[GroupedConfig]:
    """Valid configurations worth timing."""
    for block_m, warps in product((16, 32, 64), (4, 8)):
        config = GroupedConfig(block_m, power_at_least(problem.out_channels, 16, WORD), warps)
        if config.why_not(problem) is None:
            yield config


def grouped_default(problem: Problem) -> GroupedConfig:
    """The configuration where nothing was measured."""
    return next(grouped_candidates(problem))
