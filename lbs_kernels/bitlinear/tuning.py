"""Launch configurations of bitlinear on a GPU: those of the shared implicit GEMM (gpu/configs/gemm.py)."""

from __future__ import annotations

from lbs_kernels.gpu.configs.gemm import GemmConfig as Config
from lbs_kernels.gpu.configs.gemm import gemm_candidates, gemm_default
from lbs_kernels.gpu.configs.gemm import gemm_reason as invalid_reason
from lbs_kernels.program.problem import Problem

__all__ = ["Config", "candidates", "default", "invalid_reason", "is_valid"]


def is_valid(config: Config, problem: Problem) -> bool:
    """Whether `config` can run `problem`; `invalid_reason` says why not."""
    return invalid_reason(config, problem) is None


def candidates(problem: Problem) -> list[Config]:
    """Valid configurations worth timing for `problem`."""
    return list(gemm_candidates(problem))


def default(problem: Problem) -> Config:
    """The configuration used where nothing was measured."""
    return gemm_default(problem)
