"""Launch configuration of a folded stem with the maximum behind it (gpu/stem_pool.py). Needs no Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from lbs_kernels.device import GPUS
from lbs_kernels.gpu.configs.direct import power_at_least
from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.gpu.layout import PITCH
from lbs_kernels.program.planes import WORD
from lbs_kernels.program.problem import Problem

OP = "stem_pool"
WINDOW = (4, 4)  # of the folded stem
TAPS, STEP, PAD = 3, 2, 1  # of the maximum, each side: its window, stride and padding
PIECES = (8, 16)  # bytes of one asynchronous copy: those of 8 stay in the first-level cache, where neighbours find them


@dataclass(frozen=True)
class StemPoolConfig:
    """One way to launch the kernel. A tile is `block_m` pooled columns by `block_o` filters by `rows` pooled rows."""

    block_m: int
    block_o: int
    rows: int
    warps: int
    stages: int
    piece: int = 8

    def __str__(self) -> str:
        tile = f"m{self.block_m}_o{self.block_o}_r{self.rows}"
        return f"stempool_{tile}_w{self.warps}_s{self.stages}_b{self.piece}"

    @classmethod
    def parse(cls, text: str) -> StemPoolConfig:
        """The configuration that prints as `text`. Raises FormatError."""
        pattern = r"stempool_m(\d+)_o(\d+)_r(\d+)_w(\d+)_s(\d+)_b(\d+)"
        found = match_text(pattern, text, "stems with a maximum", cls(64, 64, 8, 4, 3))
        return cls(*map(int, found.groups()))

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None: folded stems, blocks of powers of two, 32 sums a thread."""
        if problem.kernel != WINDOW or problem.padding != (0, 0) or problem.in_channels > PITCH:
            return f"{self}: {problem} is no folded stem"
        if any(size < 1 or size & (size - 1) for size in (self.block_m, self.block_o, self.warps)):
            return f"{self}: blocks and warps are powers of two"
        if self.block_m < 16 or self.block_o < 16:
            return f"{self}: a tensor-core fragment has 16 rows, use blocks of at least 16"
        if self.block_o % WORD and self.block_o < problem.out_channels:
            return f"{self}: {problem.out_channels} filters in blocks of {self.block_o} would share words of {WORD}"
        if self.warps not in (4, 8) or not 1 <= self.stages <= 4 or self.rows < 1 or self.piece not in PIECES:
            return f"{self}: use 4 or 8 warps, 1 to 4 stages, at least one row, and pieces of 8 or 16 bytes"
        if self.block_m * self.block_o > 32 * 32 * self.warps:
            return f"{self}: more than 32 sums for each thread, of which it holds three"
        return None


def pooled(size: int) -> int:
    """Rows or columns behind the maximum."""
    return (size + 2 * PAD - TAPS) // STEP + 1


def stem_pool_tiles(problem: Problem, config: StemPoolConfig) -> int:
    """Programs of one launch."""
    columns = problem.batch * pooled(problem.out_width)
    strips = -(-pooled(problem.out_height) // config.rows)
    return -(-columns // config.block_m) * strips * -(-problem.out_channels // config.block_o)


def stem_pool_steps(config: StemPoolConfig) -> int:
    """Products of one program along its rows: the row that two windows share is computed once."""
    return TAPS * (STEP * config.rows + 1)


def stem_pool_default(problem: Problem) -> StemPoolConfig:
    """Where nothing was measured: tiles of 64 x 64, and as many rows as leave all multiprocessors the least to do."""
    block_o = power_at_least(problem.out_channels, 16, 64)
    block_m = power_at_least(problem.batch * pooled(problem.out_width), 16, 64)
    found = [StemPoolConfig(block_m, block_o, rows, 4, 3) for rows in range(1, 1 + min(16, pooled(problem.out_height)))]
    return min(found, key=lambda config: _rounds(problem, config) * stem_pool_steps(config))


def _rounds(problem: Problem, config: StemPoolConfig) -> int:
    return -(-stem_pool_tiles(problem, config) // GPUS["sm_90"].multiprocessors)


def stem_pool_candidates(problem: Problem) -> Iterator[StemPoolConfig]:
    """Valid configurations worth timing: those beside the default."""
    own = stem_pool_default(problem)
    for (block_m, warps), stages, piece in product(((own.block_m, 4), (2 * own.block_m, 8)), (2, 3, 4), PIECES):
        config = StemPoolConfig(block_m, own.block_o, own.rows, warps, stages, piece)
        if config.why_not(problem) is None:
            yield config
