"""Which configuration runs an operation where nothing was measured: one rule for each operation. Needs no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbs_kernels.gpu.configs.direct import (
    DepthwiseConfig,
    GroupedConfig,
    depthwise_default,
    grouped_default,
)
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig, channel_block, elementwise_default
from lbs_kernels.gpu.configs.gemm import GemmConfig, gemm_default
from lbs_kernels.program.planes import MAX_BITS
from lbs_kernels.program.problem import Problem


def conv_default(problem: Problem) -> GemmConfig | DepthwiseConfig | GroupedConfig:
    """The matrix product, or a direct kernel where there are groups."""
    if problem.groups == 1:
        return gemm_default(problem)
    return depthwise_default(problem) if problem.depthwise else grouped_default(problem)


def pool_default(problem: Problem) -> ElementwiseConfig:
    """Planes are whole words, one for each thread."""
    if 0 < problem.a_bits < MAX_BITS:
        return ElementwiseConfig(128, channel_block(problem.in_channels), warps=4)
    return elementwise_default(problem)


DEFAULTS: dict[str, Callable[[Problem], Any]] = {
    "bitconv2d": conv_default,
    "bitlinear": gemm_default,
    "pool": pool_default,
    "quantpack": elementwise_default,
    "resize": elementwise_default,
    "select": elementwise_default,
}
