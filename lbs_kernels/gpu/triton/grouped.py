"""Grouped and depthwise convolution in Triton: one multiplication per tap, channel of the group, pixel and filter.

Groups leave the tensor core too little to multiply, so this is the plain sum of numerics, on integers:

    acc[o] = sum over taps and channels c of o's group of w x

    w = 2 qw - n on the odd grid, qw - 2^(w_bits - 1) on the one with a zero;  x = qx - zero, or 2 qx - n if signed

with x = 0 outside the image.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.direct import GroupedConfig
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.triton.common import begin_step, fma
from lbs_kernels.gpu.triton.emit import EmitMeta, EmitTarget, emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, launch_options
from lbs_kernels.gpu.triton.gemm_kernel import GemmShape, tile
from lbs_kernels.program.planes import weight_units


class GroupedMeta(NamedTuple):
    """What the compiler knows of the operands."""

    kernel: tuple[int, int]
    w_bits: int
    w_scale: int  # a weight code counts as w_scale * q + w_shift
    w_shift: int
    a_bits: int
    zero: int
    signed: bool


@triton.jit
def load_code_bits(pointer, plane_stride, bit, mask, BITS: tl.constexpr):
    """Codes int32 whose planes lie at `pointer` + p * plane_stride, bit `bit` of the word; all of one shape."""
    codes = (tl.load(pointer, mask=mask, other=0) >> bit) & 1
    for plane in tl.static_range(1, BITS):
        codes = codes | (((tl.load(pointer + plane * plane_stride, mask=mask, other=0) >> bit) & 1) << plane)
    return codes


@triton.jit
def grouped_kernel(
    x_ptr,  # planes int32 [N, H, W, a_bits, CW], or biased bytes int8 [N, H, W, pitch]
    w_ptr,  # int32 [w_bits, O, T, CW of one group]
    multiplier_ptr,  # float32 [O]
    bias_ptr,  # float32 [O]
    target,
    shape,
    META: tl.constexpr,
    EMIT: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """One tile of a grouped convolution: accumulate, y = fma(float32(acc), multiplier, bias), emit."""
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_O: tl.constexpr = CONFIG.block_o
    TAPS: tl.constexpr = META.kernel[0] * META.kernel[1]
    W_BITS: tl.constexpr = META.w_bits
    A_BITS: tl.constexpr = META.a_bits
    A_LEVELS: tl.constexpr = (1 << A_BITS) - 1
    row, first = tile(shape, CONFIG)
    row_mask = row < shape.rows
    column = first + tl.arange(0, BLOCK_O)
    column_mask = column < shape.filters
    group_channels = shape.channels // shape.groups
    first_channel = column // (shape.filters // shape.groups) * group_channels  # [BLOCK_O]
    words = (shape.channels + 31) // 32
    group_words = (group_channels + 31) // 32
    pixels = shape.out_height * shape.out_width
    image_row = row // pixels * shape.height
    first_y = (row % pixels) // shape.out_width * shape.stride_h - shape.pad_h
    first_x = row % shape.out_width * shape.stride_w - shape.pad_w
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.int32)
    for step in range(0, TAPS * group_channels):
        tap = step // group_channels
        member = step % group_channels
        in_y = first_y + (tap // META.kernel[1]) * shape.dilation_h
        in_x = first_x + (tap % META.kernel[1]) * shape.dilation_w
        inside = row_mask & (in_y >= 0) & (in_y < shape.height) & (in_x >= 0) & (in_x < shape.width)
        mask = inside[:, None] & column_mask[None, :]
        pixel = x_ptr + ((image_row + in_y) * shape.width + in_x)[:, None] * shape.pitch
        channel = (first_channel + member)[None, :]
        if A_BITS == 8:
            codes = tl.load(pixel + channel, mask=mask, other=0).to(tl.int32) + 128
        else:
            codes = load_code_bits(pixel + channel // 32, words, channel % 32, mask, A_BITS)
        x = 2 * codes - A_LEVELS if META.signed else codes - META.zero
        w_word = w_ptr + (column * TAPS + tap) * group_words + member // 32
        w_codes = load_code_bits(w_word, shape.filters * TAPS * group_words, member % 32, column_mask, W_BITS)
        acc += tl.where(mask, x, 0) * (META.w_scale * w_codes + META.w_shift)[None, :]
    multiplier = tl.load(multiplier_ptr + column, mask=column_mask, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    emit(y, row, row_mask, first, shape.filters, target, EMIT)


def bind_grouped(
    x: Tensor,
    weights: GemmWeights,
    multiplier: Tensor,
    bias: Tensor,
    target: EmitTarget,
    emit_meta: EmitMeta,
    shape: GemmShape,
    config: GroupedConfig,
) -> Launch:
    """A launch of `grouped_kernel` on activations x in their GPU form, everything fixed."""
    source = weights.source
    units = weight_units(weights.bits, weights.grid)
    meta = GroupedMeta(weights.kernel, weights.bits, *units, source.bits, source.zero, source.signed)
    grid = (triton.cdiv(shape.rows, config.block_m) * triton.cdiv(shape.filters, config.block_o),)
    run = functools.partial(
        grouped_kernel[grid], x, weights.planes, multiplier, bias, target, shape,
        META=meta, EMIT=emit_meta, CONFIG=config, **launch_options(config.warps, 2), launch_pdl=overlaps(),
    )  # fmt: skip
    return lambda inputs: run()
