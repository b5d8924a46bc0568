"""bitlinear in CUDA C++: the one-bit GEMM of gpu/onebit/gemm.py on one pixel per row."""

from __future__ import annotations

from torch import Tensor

from lbs_kernels.bitlinear.posed import posed
from lbs_kernels.gpu.configs.onebit import OneBitConfig, unsupported_reason
from lbs_kernels.gpu.onebit.gemm import bind_onebit, onebit_accumulate, prepare_weights, step_reason

__all__ = ["accumulate", "bind", "prepare_weights", "step_reason", "supports"]

bind, supports = bind_onebit, unsupported_reason


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
    return onebit_accumulate(x_codes[:, None, None], w_planes, source, problem, config)[:, 0, 0]
