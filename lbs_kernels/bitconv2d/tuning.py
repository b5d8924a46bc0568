"""Launch configurations of bitconv2d on a GPU: those of the shared implicit GEMM (gemm_config.py)."""

from __future__ import annotations

from lbs_kernels.gemm_config import GemmConfig as Config
from lbs_kernels.gemm_config import gemm_candidates, gemm_default, invalid_reason, is_valid
from lbs_kernels.problem import Problem

__all__ = ["Config", "candidates", "default", "invalid_reason", "is_valid"]


def candidates(problem: Problem) -> list[Config]:
    """Valid configurations worth timing for `problem`."""
    return list(gemm_candidates(problem))


def default(problem: Problem) -> Config:
    """The configuration used where nothing was measured."""
    return gemm_default(problem)
