"""bitconv2d in Triton: the implicit GEMM with a window, or the direct kernels where there are groups."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lbs_kernels.bitconv2d import tuning
from lbs_kernels.bitconv2d.posed import posed
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig, gemm_default
from lbs_kernels.gpu.kernels import Launch
from lbs_kernels.gpu.triton.depthwise import bind_depthwise
from lbs_kernels.gpu.triton.emit import bind_emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, bind_gemm, bits_reason, gemm_accumulate, gemm_shape
from lbs_kernels.gpu.triton.grouped import bind_grouped
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Program


def supports(problem: Problem) -> str | None:
    """Why this back end cannot serve `problem`, or None."""
    return bits_reason(problem)


def bind(
    step: ConvStep,
    problem: Problem,
    config: tuning.Config,
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
    if isinstance(config, DepthwiseConfig):
        return bind_depthwise(*operands, config)
    if isinstance(config, GroupedConfig):
        return bind_grouped(*operands, config)
    return bind_gemm(*operands, config)


def accumulate(
    x_codes: Tensor,
    w_planes: Tensor,
    *,
    a_bits: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    zero: int = 0,
    signed: bool = False,
    config: GemmConfig | None = None,
) -> Tensor:
    """The accumulator int32 [N, H', W', O] of one group; arguments as in reference.py, plus the launch configuration.

    Raises:
        BackendError: a configuration that does not fit.
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
        ShapeError: signed codes with padding.
    """
    problem, source = posed(x_codes, w_planes, a_bits, kernel, stride, padding, dilation, zero, signed)
    config = gemm_default(problem) if config is None else config
    reason = supports(problem) or tuning.invalid_reason(config, problem)
    if reason is not None:
        raise BackendError(f"triton cannot serve {problem}: {reason}")
    return gemm_accumulate(x_codes, w_planes, source, problem, config)
