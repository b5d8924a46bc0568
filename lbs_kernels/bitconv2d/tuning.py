"""Launch configurations of bitconv2d on a GPU: the implicit GEMM, and the direct kernels where there are groups."""

from __future__ import annotations

from lbs_kernels.gpu.configs.direct import (
    DepthwiseConfig,
    GroupedConfig,
    depthwise_candidates,
    depthwise_default,
    depthwise_reason,
    grouped_candidates,
    grouped_reason,
    is_depthwise,
)
from lbs_kernels.gpu.configs.gemm import GemmConfig, gemm_candidates, gemm_default, gemm_reason
from lbs_kernels.program.problem import Problem

Config = GemmConfig | DepthwiseConfig | GroupedConfig


def invalid_reason(config: Config, problem: Problem) -> str | None:
    """Why `config` cannot run `problem`, or None."""
    if isinstance(config, DepthwiseConfig):
        return depthwise_reason(config, problem)
    if isinstance(config, GroupedConfig):
        return grouped_reason(config, problem)
    return gemm_reason(config, problem)


def is_valid(config: Config, problem: Problem) -> bool:
    """Whether `config` can run `problem`; `invalid_reason` says why not."""
    return invalid_reason(config, problem) is None


def candidates(problem: Problem) -> list[Config]:
    """Valid configurations worth timing for `problem`, of every kernel that can serve it."""
    if problem.groups == 1:
        return list(gemm_candidates(problem))
    return [*depthwise_candidates(problem), *grouped_candidates(problem)]


def default(problem: Problem) -> Config:
    """The configuration used where nothing was measured."""
    if is_depthwise(problem):
        return depthwise_default(problem)
    return gemm_default(problem) if problem.groups == 1 else next(grouped_candidates(problem))
