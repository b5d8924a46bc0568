"""bitconv2d and bitlinear in Triton: the implicit GEMM, or the direct kernels where there are groups."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig, strips_why_not
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.triton.depthwise import bind_depthwise
from lbs_kernels.gpu.triton.depthwise_columns import bind_columns
from lbs_kernels.gpu.triton.emit import bind_emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, bind_gemm, gemm_shape, prepare_weights
from lbs_kernels.gpu.triton.grouped import bind_grouped
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, LinearStep, Program

__all__ = ["bind", "prepare_weights", "writes_why_not"]


def writes_why_not(
    step: ConvStep | LinearStep, config: GemmConfig | DepthwiseConfig | GroupedConfig, program: Program
) -> str | None:
    """Why a configuration cannot run a step, beyond what its problem says."""
    return strips_why_not(step, config, program) if isinstance(config, DepthwiseConfig) else None


def bind(
    step: ConvStep | LinearStep,
    problem: Problem,
    config: GemmConfig | DepthwiseConfig | GroupedConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: GemmWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    multiplier, bias = arrays[step.multiplier], arrays[step.bias]
    shape = gemm_shape(problem, program.tensors[step.input])
    operands = (buffers[step.input], weights, multiplier, bias, target, meta, shape)
    if isinstance(config, DepthwiseConfig) and config.columns:
        return bind_columns(*operands, problem, config)
    if isinstance(config, DepthwiseConfig):
        return bind_depthwise(*operands, config)
    if isinstance(config, GroupedConfig):
        return bind_grouped(*operands, config)
    return bind_gemm(*operands, config)
