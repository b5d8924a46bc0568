"""Launch configuration of the kernels that touch every element once (all without weights). Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.program.planes import WORD
from lbs_kernels.program.problem import Problem

ELEMENTS = 64  # per thread: float32 values, codes and addresses of that many stay in 255 registers


@dataclass(frozen=True)
class ElementwiseConfig:
    """A tile is `block_m` pixels by `block_c` channels."""

    block_m: int
    block_c: int
    warps: int

    def __str__(self) -> str:
        return f"elementwise_m{self.block_m}_c{self.block_c}_w{self.warps}"

    @classmethod
    def parse(cls, text: str) -> ElementwiseConfig:
        """The configuration that prints as `text`. Raises FormatError."""
        found = match_text(r"elementwise_m(\d+)_c(\d+)_w(\d+)", text, "elementwise kernels", cls(32, 32, 4))
        return cls(*map(int, found.groups()))

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None. The one place where the rule is stated.

        Blocks are powers of two; a tile holds whole words of 32 channels, or all channels there are, and at most 64
        elements per thread.
        """
        if any(size < 1 or size & (size - 1) for size in (self.block_m, self.block_c, self.warps)):
            return f"{self}: blocks and warps are powers of two"
        if self.block_c % WORD and self.block_c < problem.in_channels:
            return f"{self}: {problem.in_channels} channels in blocks of {self.block_c} would share words of {WORD}"
        if self.block_m * self.block_c > ELEMENTS * 32 * self.warps:
            return f"{self}: more than {ELEMENTS} elements per thread"
        return None


def channel_block(channels: int) -> int:
    """The smallest power of two that holds the channels, up to one word."""
    return min(WORD, 1 << (channels - 1).bit_length())


def elementwise_candidates(problem: Problem) -> list[ElementwiseConfig]:
    """Valid configurations worth timing: a whole word, or all channels where there are fewer."""
    small = channel_block(problem.in_channels)
    blocks = [small] if small < WORD else [WORD, 2 * WORD]
    found = [ElementwiseConfig(m, c, warps) for c in blocks for m in (16, 32, 64, 128, 256) for warps in (2, 4, 8)]
    return [config for config in found if config.why_not(problem) is None]


def elementwise_default(problem: Problem) -> ElementwiseConfig:
    """The configuration where nothing was measured: 1024 elements in 128 threads."""
    block_c = channel_block(problem.in_channels)
    return ElementwiseConfig(min(256, 1024 // block_c), block_c, warps=4)
