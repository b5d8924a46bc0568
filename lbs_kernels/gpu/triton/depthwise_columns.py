"""Depthwise convolution of bytes by 3 x 3 windows, column by column: what neighbours share is loaded and turned once.

A thread has a strip of output columns, two rows high (one where the window steps by two), and 16 channels. Of every
input column it reads the four pixels below one another that its rows see, and transposes them into registers that hold
the four pixels of one channel. One `dp4a` is then the part of that column in an output,

    row 0: (w_0, w_1, w_2, 0) . (x_0, x_1, x_2, x_3)      row 1: (0, w_0, w_1, w_2) . (x_0, x_1, x_2, x_3)

three of them an output; a column serves three outputs of each row. So a pixel is loaded twice and not nine times, and a
byte is permuted half as often as where every output gathers its own taps (gpu/triton/depthwise.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, column_positions, column_rows
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.triton.common import begin_step, fma
from lbs_kernels.gpu.triton.depthwise import dot_bytes, natural_order, permute_bytes
from lbs_kernels.gpu.triton.emit import EmitMeta, EmitTarget, emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, launch_options
from lbs_kernels.gpu.triton.gemm_kernel import GemmOperands, GemmShape
from lbs_kernels.gpu.weights import centre_bytes
from lbs_kernels.program.planes import WORD, words
from lbs_kernels.program.problem import Problem

TAPS = 3


class ColumnsMeta(NamedTuple):
    """What the compiler knows of a step; everything here selects code."""

    step: int  # of the window, each way
    padded: bool  # windows reach beyond the image, those of rows and columns that are not written too
    tail: bool  # the last block reaches beyond the channels
    exact: bool  # strips divide the rows of the output


def column_registers(codes: Tensor, bits: int, grid: str) -> Tensor:
    """int32 [3, 4, 8 CW] of codes uint8 [C, 9].

    Byte y of register (x, i, r) weighs row y of column x of channel 4 r + i; the fourth byte weighs nothing.
    """
    channels = codes.shape[0]
    byte = torch.zeros(words(channels) * WORD, TAPS, 4, dtype=torch.uint8)
    byte[:channels, :, :TAPS] = centre_bytes(codes, bits, grid).reshape(channels, TAPS, TAPS).transpose(1, 2)
    return byte.reshape(-1, 4, TAPS, 4).permute(2, 1, 0, 3).contiguous().view(torch.int32).squeeze(-1)


@triton.jit
def load_registers(pointer, there, MASKED: tl.constexpr):
    """Words; 0 where masked, if anything is."""
    return tl.load(pointer, mask=there, other=0) if MASKED else tl.load(pointer)


@triton.jit
def line_of(operands, image, y, register, shape, pitch, META: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_C / 4] of pixel 0 of an image's row, and words [BLOCK_M] to the next pixel.

    Outside the image both are such that every pixel is the one that pads.
    """
    start = operands.x + (image * shape.height + y) * shape.width * pitch
    step = pitch
    if META.padded:
        inside = (y >= 0) & (y < shape.height)
        start, step = tl.where(inside, start, operands.padding), tl.where(inside, pitch, 0)
    return start[:, None] + register[None, :], step


@triton.jit
def load_pixel(line, step, x, there, operands, register, shape, META: tl.constexpr, EDGE: tl.constexpr):
    """Registers [BLOCK_M, BLOCK_C / 4] of pixel x of a row. EDGE: it may lie beside the image."""
    pointer = line + (x * step)[:, None]
    if EDGE and META.padded:
        inside = (x >= 0) & (x < shape.width)
        pointer = tl.where(inside[:, None], pointer, operands.padding + register[None, :])
    return load_registers(pointer, there[None, :], META.tail)


@triton.jit
def load_column(
    l0, l1, l2, l3, s0, s1, s2, s3, x, there, operands, register, shape,
    META: tl.constexpr, EDGE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Four registers [BLOCK_M, BLOCK_C / 4], one for each channel of four, of 3 or 4 pixels below one another."""
    a = load_pixel(l0, s0, x, there, operands, register, shape, META, EDGE)
    b = load_pixel(l1, s1, x, there, operands, register, shape, META, EDGE)
    c = load_pixel(l2, s2, x, there, operands, register, shape, META, EDGE)
    ab_low = permute_bytes(a, b, 0x5140)  # a0 b0 a1 b1
    ab_high = permute_bytes(a, b, 0x7362)  # a2 b2 a3 b3
    if ROWS == 2:
        d = load_pixel(l3, s3, x, there, operands, register, shape, META, EDGE)
        cd_low = permute_bytes(c, d, 0x5140)
        cd_high = permute_bytes(c, d, 0x7362)
        x0 = permute_bytes(ab_low, cd_low, 0x5410)  # a0 b0 c0 d0
        x1 = permute_bytes(ab_low, cd_low, 0x7632)
        x2 = permute_bytes(ab_high, cd_high, 0x5410)
        x3 = permute_bytes(ab_high, cd_high, 0x7632)
    else:  # the fourth byte weighs nothing
        x0 = permute_bytes(ab_low, c, 0x4410)
        x1 = permute_bytes(ab_low, c, 0x5532)
        x2 = permute_bytes(ab_high, c, 0x6610)
        x3 = permute_bytes(ab_high, c, 0x7732)
    return x0, x1, x2, x3


@triton.jit
def load_four(pointer, registers, there, MASKED: tl.constexpr):
    """Four registers [1, BLOCK_C / 4], one for each channel of four."""
    w0 = load_registers(pointer, there, MASKED)[None, :]
    w1 = load_registers(pointer + registers, there, MASKED)[None, :]
    w2 = load_registers(pointer + 2 * registers, there, MASKED)[None, :]
    w3 = load_registers(pointer + 3 * registers, there, MASKED)[None, :]
    return w0, w1, w2, w3


@triton.jit
def three_dots(a, b, c, u, v, w, total, SHIFT: tl.constexpr):
    """total + the sum over three columns of one row of outputs."""
    return dot_bytes(c, w << SHIFT, dot_bytes(b, v << SHIFT, dot_bytes(a, u << SHIFT, total)))


@triton.jit
def row_of(
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, u0, u1, u2, u3, v0, v1, v2, v3, w0, w1, w2, w3, o0, o1, o2, o3,
    SHIFT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Sums int32 [BLOCK_M, BLOCK_C] of one output of every position, of columns a, b, c with weights u, v, w, from the
    offset o on.
    """
    s0 = three_dots(a0, b0, c0, u0, v0, w0, a0 * 0 + o0, SHIFT)
    s1 = three_dots(a1, b1, c1, u1, v1, w1, a0 * 0 + o1, SHIFT)
    s2 = three_dots(a2, b2, c2, u2, v2, w2, a0 * 0 + o2, SHIFT)
    s3 = three_dots(a3, b3, c3, u3, v3, w3, a0 * 0 + o3, SHIFT)
    return natural_order(s0, s1, s2, s3, 8, CONFIG)


@triton.jit
def write_row(acc, pixel, mask, first, operands, target, shape, META: tl.constexpr, EMIT: tl.constexpr):
    """The epilogue of one output of every position."""
    column = first + tl.arange(0, acc.shape[1])
    known = column < shape.channels
    multiplier = load_registers(operands.multiplier + column, known, META.tail)
    bias = load_registers(operands.bias + column, known, META.tail)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    emit(y, pixel, mask, first, shape.channels, target, EMIT)


@triton.jit
def depthwise_columns_kernel(operands, target, shape, META: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr):
    """One tile of positions and channels. A position is a strip of an image, COLUMNS wide and ROWS high."""
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    COLUMNS: tl.constexpr = CONFIG.columns
    STEP: tl.constexpr = META.step
    ROWS: tl.constexpr = 3 - STEP
    channel_blocks = (shape.channels + BLOCK_C - 1) // BLOCK_C
    strips = (shape.out_width + COLUMNS - 1) // COLUMNS
    lines = (shape.out_height + ROWS - 1) // ROWS
    images = shape.rows // (shape.out_height * shape.out_width)
    program = tl.program_id(0)
    position = program // channel_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = program % channel_blocks * BLOCK_C
    valid = tl.minimum(position, images * lines * strips - 1)
    image = valid // (lines * strips)
    out_y = valid // strips % lines * ROWS
    out_x = valid % strips * COLUMNS
    pitch = tl.multiple_of(shape.pitch // 4, 4)
    registers = (shape.channels + 31) // 32 * 8
    register = first // 4 + tl.arange(0, BLOCK_C // 4)
    there = register < pitch
    y = out_y * STEP - shape.pad_h
    x = out_x * STEP - shape.pad_w
    u0, u1, u2, u3 = load_four(operands.w + register, registers, there, META.tail)
    v0, v1, v2, v3 = load_four(operands.w + 4 * registers + register, registers, there, META.tail)
    w0, w1, w2, w3 = load_four(operands.w + 8 * registers + register, registers, there, META.tail)
    o0, o1, o2, o3 = load_four(operands.offset + register, registers, there, META.tail)
    l0, s0 = line_of(operands, image, y, register, shape, pitch, META)
    l1, s1 = line_of(operands, image, y + 1, register, shape, pitch, META)
    l2, s2 = line_of(operands, image, y + 2, register, shape, pitch, META)
    l3, s3 = line_of(operands, image, y + 3, register, shape, pitch, META)
    a0, a1, a2, a3 = load_column(
        l0, l1, l2, l3, s0, s1, s2, s3, x, there, operands, register, shape, META, True, ROWS
    )  # fmt: skip
    b0, b1, b2, b3 = a0, a1, a2, a3
    if STEP == 1:
        b0, b1, b2, b3 = load_column(
            l0, l1, l2, l3, s0, s1, s2, s3, x + 1, there, operands, register, shape, META, not META.exact, ROWS
        )  # fmt: skip
    pixel = (image * shape.out_height + out_y) * shape.out_width + out_x
    known = position < images * lines * strips
    for j in tl.static_range(COLUMNS):
        # Where strips divide the image, their first and last columns alone may lie beside it.
        if STEP == 2:
            b0, b1, b2, b3 = load_column(
                l0, l1, l2, l3, s0, s1, s2, s3, x + (2 * j + 1), there, operands, register, shape, META,
                not META.exact, ROWS,
            )  # fmt: skip
        c0, c1, c2, c3 = load_column(
            l0, l1, l2, l3, s0, s1, s2, s3, x + (STEP * j + 2), there, operands, register, shape, META,
            (j == COLUMNS - 1) or not META.exact, ROWS,
        )  # fmt: skip
        mask = known
        if not META.exact:
            mask = known & (out_x + j < shape.out_width)
        acc = row_of(
            a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, u0, u1, u2, u3, v0, v1, v2, v3, w0, w1, w2, w3,
            o0, o1, o2, o3, 0, CONFIG,
        )  # fmt: skip
        write_row(acc, pixel + j, mask, first, operands, target, shape, META, EMIT)
        if ROWS == 2:
            acc = row_of(
                a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, u0, u1, u2, u3, v0, v1, v2, v3, w0, w1, w2, w3,
                o0, o1, o2, o3, 8, CONFIG,
            )  # fmt: skip
            below = mask & (out_y + 1 < shape.out_height)
            write_row(acc, pixel + shape.out_width + j, below, first, operands, target, shape, META, EMIT)
        if STEP == 1:
            a0, a1, a2, a3 = b0, b1, b2, b3
            b0, b1, b2, b3 = c0, c1, c2, c3
        else:
            a0, a1, a2, a3 = c0, c1, c2, c3


def columns_meta(problem: Problem, config: DepthwiseConfig | ProjectConfig) -> ColumnsMeta:
    """The facts of a problem for one configuration."""
    exact = problem.out_width % config.columns == 0
    whole = exact and problem.out_height % column_rows(problem) == 0
    return ColumnsMeta(
        problem.stride[0],
        padded=problem.padding != (0, 0) or not whole,
        tail=problem.in_channels % config.block_c != 0,
        exact=exact,
    )


def bind_columns(
    x: Tensor,
    weights: GemmWeights,
    multiplier: Tensor,
    bias: Tensor,
    target: EmitTarget,
    emit_meta: EmitMeta,
    shape: GemmShape,
    problem: Problem,
    config: DepthwiseConfig,
) -> Launch:
    """A launch of `depthwise_columns_kernel` on biased bytes x, everything fixed."""
    codes, channels = weights.codes.squeeze(-1), shape.channels
    taps = column_registers(codes, weights.bits, weights.grid).to(x.device)
    offset = torch.nn.functional.pad(weights.offset, (0, words(channels) * WORD - channels))
    operands = GemmOperands(
        x.view(torch.int32), weights.padding.view(torch.int32), taps, offset.reshape(-1, 4).T.contiguous(), multiplier,
        bias,
    )  # fmt: skip
    tiles = triton.cdiv(column_positions(problem, config.columns), config.block_m)
    grid = (tiles * triton.cdiv(channels, config.block_c),)
    run = functools.partial(
        depthwise_columns_kernel[grid], operands, target, shape, META=columns_meta(problem, config), EMIT=emit_meta,
        CONFIG=config,
        **launch_options(config.warps, 1), launch_pdl=overlaps(),
    )  # fmt: skip
    return lambda inputs: run()
