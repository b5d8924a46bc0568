"""Which configurations run an operation where nothing was measured: one rule for each operation. Needs no Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lbs_kernels.gpu.configs.cuda import s8_default
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


def weighted_defaults(problem: Problem) -> Iterator[Any]:
    """The s8 kernel where its rule takes it, and Triton's."""
    preferred = s8_default(problem)
    if preferred is not None:
        yield preferred
    yield conv_default(problem)


# In the order of preference; the last serves every problem of the operation.
DEFAULTS: dict[str, Callable[[Problem], Iterator[Any]]] = {
    "bitconv2d": weighted_defaults,
    "bitlinear": weighted_defaults,
    "pool": lambda problem: iter([pool_default(problem)]),
    "quantpack": lambda problem: iter([elementwise_default(problem)]),
    "resize": lambda problem: iter([elementwise_default(problem)]),
    "select": lambda problem: iter([elementwise_default(problem)]),
}
