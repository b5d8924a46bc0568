"""bitlinear in CUDA C++: the one-bit GEMM of onebit_gemm.py on one pixel per row."""

from __future__ import annotations

from torch import Tensor

from lbs_kernels.bitlinear.posed import posed
from lbs_kernels.errors import BackendError
from lbs_kernels.onebit_config import OneBitConfig, onebit_default, unsupported_reason
from lbs_kernels.onebit_gemm import bind_onebit, onebit_accumulate, prepare_weights, step_reason
from lbs_kernels.problem import Problem

__all__ = ["accumulate", "bind", "prepare_weights", "step_reason", "supports"]

bind = bind_onebit


def supports(problem: Problem) -> str | None:
    """Why this back end cannot serve `problem`, or None."""
    return unsupported_reason(problem)


def accumulate(
    x_codes: Tensor,
    w_planes: Tensor,
    *,
    a_bits: int,
    zero: int = 0,
    signed: bool = False,
    config: OneBitConfig | None = None,
) -> Tensor:
    """The accumulator int32 [N, O]; arguments as in reference.py, plus the launch configuration.

    Raises:
        BackendError: bits or configuration that is not served.
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
    """
    problem, source = posed(x_codes, w_planes, a_bits, zero, signed)
    reason = unsupported_reason(problem)
    if reason is not None:
        raise BackendError(f"one-bit kernels cannot serve {problem}: {reason}")
    config = onebit_default(problem) if config is None else config
    return onebit_accumulate(x_codes[:, None, None], w_planes, source, problem, config)[:, 0, 0]
