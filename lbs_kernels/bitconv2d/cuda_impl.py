"""bitconv2d in CUDA C++: the implicit GEMM on one-bit tensor cores of gpu/onebit/gemm.py, for 2- and 4-bit codes."""

from __future__ import annotations

from torch import Tensor

from lbs_kernels.bitconv2d.posed import posed
from lbs_kernels.gpu.configs.onebit import OneBitConfig, unsupported_reason
from lbs_kernels.gpu.onebit.gemm import bind_onebit, onebit_accumulate, prepare_weights, step_reason

__all__ = ["accumulate", "bind", "prepare_weights", "step_reason", "supports"]

bind, supports = bind_onebit, unsupported_reason


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
    config: OneBitConfig | None = None,
) -> Tensor:
    """The accumulator int32 [N, H', W', O] of one group; arguments as in reference.py, plus the launch configuration.

    Raises:
        BackendError: bits, zero point or configuration that is not served.
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
        ShapeError: signed codes with padding.
    """
    problem, source = posed(x_codes, w_planes, a_bits, kernel, stride, padding, dilation, zero, signed)
    return onebit_accumulate(x_codes, w_planes, source, problem, config)
