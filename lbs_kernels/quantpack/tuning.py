"""Launch configurations of quantpack on a GPU; the rules are stated in gpu/configs/elementwise.py."""

from __future__ import annotations

from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig as Config
from lbs_kernels.gpu.configs.elementwise import elementwise_candidates, elementwise_default, invalid_reason, is_valid
from lbs_kernels.program.problem import Problem

__all__ = ["Config", "candidates", "default", "invalid_reason", "is_valid"]


def candidates(problem: Problem) -> list[Config]:
    """Valid configurations worth timing for `problem`."""
    return elementwise_candidates(problem)


def default(problem: Problem) -> Config:
    """The configuration used where nothing was measured."""
    return elementwise_default(problem)
