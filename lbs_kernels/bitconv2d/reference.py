"""The definition of bitconv2d: an exact integer convolution, then one fused multiply-add per output.

    unsigned:       acc = sum_k (2 qw - n_w) qx
    signed:         acc = sum_k (2 qw - n_w) (2 qx - n_x)
    network input:  acc = sum_k (2 qw - n_w) (qx - zero)          padding is the code `zero`, a real 0
    y = fma(float32(acc), multiplier[o], bias[o])

The sum runs in float64, where integers are exact below 2^53 and the order of additions does not matter; the guard keeps
|acc| below 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels.bitconv2d.posed import check_padding
from lbs_kernels.program.planes import check_accumulator, unpack_weights


def centred_weights(w_planes: Tensor, channels: int) -> Tensor:
    """float64 [O, T, C] of 2 qw - n_w, from planes int32 [bits, O, T, CW]; C is the channels of one group."""
    levels = (1 << w_planes.shape[0]) - 1
    return unpack_weights(w_planes, channels).double() * 2 - levels


def centred_activations(x_codes: Tensor, a_bits: int, zero: int, signed: bool) -> Tensor:
    """float64 of qx - zero, or of 2 qx - n_x if signed; same shape as x_codes."""
    return x_codes.double() * 2 - ((1 << a_bits) - 1) if signed else x_codes.double() - zero


def accumulate(
    x_codes: Tensor,
    w_planes: Tensor,
    *,
    a_bits: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero: int = 0,
    signed: bool = False,
) -> Tensor:
    """The accumulator.

    Args:
        x_codes: uint8 [N, H, W, C], values below 2^a_bits.
        w_planes: int32 [w_bits, O, kh * kw, CW], CW over the C / groups channels of one group.
        a_bits, zero, signed: how codes are read; signed codes have no zero and cannot be padded.

    Returns:
        int32 [N, H', W', O].

    Raises:
        FormatError: the accumulator could overflow, or the planes do not fit C / groups.
        ShapeError: signed codes with padding.
    """
    check_padding(signed, padding)
    w_bits, filters, taps, _ = w_planes.shape
    group_channels = x_codes.shape[3] // groups
    check_accumulator(taps * group_channels, w_bits, a_bits, "bitconv2d")
    weight = centred_weights(w_planes, group_channels).reshape(filters, *kernel, group_channels).permute(0, 3, 1, 2)
    image = centred_activations(x_codes, a_bits, zero, signed).permute(0, 3, 1, 2)
    # Plain im2col and matrix product: cuDNN might pick a transform (FFT, Winograd) that is not exact.
    with torch.backends.cudnn.flags(enabled=False):
        acc = torch.nn.functional.conv2d(
            image, weight, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    return acc.permute(0, 2, 3, 1).to(torch.int32)
