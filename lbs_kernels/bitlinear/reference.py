"""The definition of bitlinear: an exact integer matrix product, then one fused multiply-add per output.

    acc[n, o] = sum_c (2 qw[o, c] - n_w) * x[n, c],     x = qx - zero, or 2 qx - n_x if signed
    y = fma(float32(acc), multiplier[o], bias[o])

The sum runs in float64, where every partial sum is exact, so the order of additions does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels.program.planes import check_accumulator, unpack_weights


def accumulate(x_codes: Tensor, w_planes: Tensor, *, a_bits: int, zero: int = 0, signed: bool = False) -> Tensor:
    """The accumulator int32 [N, O] of codes uint8 [N, C] and planes int32 [w_bits, O, 1, CW].

    float64 holds every partial sum exactly (below 2^31), so the order of additions does not matter.

    Raises:
        FormatError: the accumulator could overflow, or the planes do not fit C.
    """
    w_bits = w_planes.shape[0]
    channels = x_codes.shape[1]
    check_accumulator(channels, w_bits, a_bits, "bitlinear")
    weight = unpack_weights(w_planes, channels)[:, 0].double() * 2 - ((1 << w_bits) - 1)
    x = x_codes.double() * 2 - ((1 << a_bits) - 1) if signed else x_codes.double() - zero
    return (x @ weight.T).to(torch.int32)
