"""Launch configurations of pool on a GPU; the rules are stated in gpu/configs/elementwise.py."""

from __future__ import annotations

from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig as Config
from lbs_kernels.gpu.configs.elementwise import (
    channel_block,
    elementwise_candidates,
    elementwise_default,
    invalid_reason,
    is_valid,
)
from lbs_kernels.program.planes import MAX_BITS
from lbs_kernels.program.problem import Problem

__all__ = ["Config", "candidates", "default", "invalid_reason", "is_valid"]


def candidates(problem: Problem) -> list[Config]:
    """Valid configurations worth timing for `problem`."""
    return elementwise_candidates(problem)


def default(problem: Problem) -> Config:
    """The configuration used where nothing was measured; planes are whole words, one for each thread."""
    if 0 < problem.a_bits < MAX_BITS:
        return Config(128, channel_block(problem.in_channels), warps=4)
    return elementwise_default(problem)
