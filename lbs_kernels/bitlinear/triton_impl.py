"""bitlinear in Triton: the implicit GEMM of gpu/triton/gemm.py on one pixel per row."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lbs_kernels.bitlinear import tuning
from lbs_kernels.bitlinear.posed import posed
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.kernels import Launch
from lbs_kernels.gpu.triton.emit import bind_emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, bind_gemm, bits_reason, gemm_accumulate, gemm_shape
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import LinearStep, Program


def supports(problem: Problem) -> str | None:
    """Why this back end cannot serve `problem`, or None."""
    return bits_reason(problem)


def bind(
    step: LinearStep,
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
    return bind_gemm(buffers[step.input], weights, multiplier, bias, target, meta, shape, config)


def accumulate(
    x_codes: Tensor,
    w_planes: Tensor,
    *,
    a_bits: int,
    zero: int = 0,
    signed: bool = False,
    config: tuning.Config | None = None,
) -> Tensor:
    """The accumulator int32 [N, O]; arguments as in reference.py, plus the launch configuration.

    Raises:
        BackendError: a configuration that does not fit.
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
    """
    problem, source = posed(x_codes, w_planes, a_bits, zero, signed)
    config = tuning.default(problem) if config is None else config
    reason = supports(problem) or tuning.invalid_reason(config, problem)
    if reason is not None:
        raise BackendError(f"triton cannot serve {problem}: {reason}")
    return gemm_accumulate(x_codes[:, None, None], w_planes, source, problem, config)[:, 0, 0]
