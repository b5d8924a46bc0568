"""A folded stem and the maximum behind it in one kernel: the map between them never leaves the registers.

The maximum is taken of integers. Everything between the sums and the maximum rises or falls with them, so that

    max over the window of f(acc) = f(max acc), or f(min acc) where the multiplier is negative

and the epilogue runs once for each pixel of the maximum, not for the nine that it looks at. `acc ^ flip` with flip = -1
turns the order of integers around, without a case of its own.

A program has BLOCK_M columns of pooled pixels, of any images, and goes down ROWS of their rows. A row of the
convolution that two windows share is kept, so that six products and not nine make a pooled pixel: its columns are
computed where they are asked for, by neighbours again. Beyond the image a window asks for the pixel at its edge, which
is in the window as well, so that nothing is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.stem_pool import StemPoolConfig, pooled, stem_pool_tiles
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.layout import PITCH
from lbs_kernels.gpu.stem_pool import PooledStem
from lbs_kernels.gpu.triton.common import as_stream, at_least, at_most, begin_step, fma
from lbs_kernels.gpu.triton.emit import bind_emit, emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, launch_options, prepare_weights
from lbs_kernels.gpu.weights import centre_bytes
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program

__all__ = ["bind", "prepare_weights"]

LEAST = tl.constexpr(-(2**31))


class StemShape(NamedTuple):
    """Sizes read at run time."""

    columns: int  # N * out_width
    filters: int
    height: int  # of the folded image
    width: int
    conv_height: int  # of the map that is not stored
    conv_width: int
    out_height: int  # behind the maximum
    out_width: int


class StemOperands(NamedTuple):
    """Pointers of one step. Filters are padded to whole blocks in w and flip."""

    x: Tensor  # int8 [N, height, width, 16]
    w: Tensor  # int8 [O, 256]
    flip: Tensor  # int32 [O], -1 where the multiplier is negative, else 0
    offset: Tensor  # int32 [O]
    multiplier: Tensor  # float32 [O]
    bias: Tensor  # float32 [O]


class Before(NamedTuple):
    """What the compiler knows of a clamp and a rounding in front of the maximum's own epilogue."""

    low: float | None
    high: float | None
    dtype: str


@triton.jit
def finish(
    best, operands, column, below, first, target, shape, FLIP: tl.constexpr, BEFORE: tl.constexpr, EMIT: tl.constexpr
):
    """The epilogue of pooled row `below` of these columns."""
    filters = first + tl.arange(0, best.shape[1])
    mask = filters < shape.filters
    acc = best
    if FLIP:
        acc = acc ^ tl.load(operands.flip + filters)[None, :]
    acc += tl.load(operands.offset + filters, mask=mask, other=0)[None, :]
    multiplier = tl.load(operands.multiplier + filters, mask=mask, other=0.0)
    bias = tl.load(operands.bias + filters, mask=mask, other=0.0)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    if BEFORE is not None:
        LOW: tl.constexpr = BEFORE.low
        HIGH: tl.constexpr = BEFORE.high
        DTYPE: tl.constexpr = BEFORE.dtype
        if LOW is not None:
            y = at_least(y, LOW)
        if HIGH is not None:
            y = at_most(y, HIGH)
        y = as_stream(y, DTYPE)
    pixel = (column // shape.out_width * shape.out_height + below) * shape.out_width + column % shape.out_width
    emit(y, pixel, column < shape.columns, first, shape.filters, target, EMIT)


@triton.jit
def stem_pool_kernel(
    operands, target, shape, FLIP: tl.constexpr, BEFORE: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr
):
    """One tile: BLOCK_M pooled columns, ROWS pooled rows, BLOCK_O filters."""
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_O: tl.constexpr = CONFIG.block_o
    PIECE: tl.constexpr = CONFIG.piece
    RUN: tl.constexpr = 64  # bytes of four pixels, a row of the window
    K: tl.constexpr = 4 * RUN
    filter_blocks = (shape.filters + BLOCK_O - 1) // BLOCK_O
    strips = (shape.out_height + CONFIG.rows - 1) // CONFIG.rows
    program = tl.program_id(0)
    first = program % filter_blocks * BLOCK_O
    top = program // filter_blocks % strips * CONFIG.rows
    column = program // filter_blocks // strips * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tl.minimum(column, shape.columns - 1)
    image = operands.x + valid // shape.out_width * (shape.height * shape.width * 16)
    left = 2 * (valid % shape.out_width) - 1
    k = tl.arange(0, K)
    within = k // RUN * (shape.width * 16) + k % RUN
    filters = first + tl.arange(0, BLOCK_O)
    w = tl.load(operands.w + filters[:, None] * K + k[None, :])
    if FLIP:
        flip = tl.load(operands.flip + filters)[None, :]
    least = tl.full([BLOCK_M, BLOCK_O], LEAST, dtype=tl.int32)
    line, best = least, least  # of one row of the convolution, and of the window
    tap, row = 0, 0
    for _ in range(3 * (2 * tl.minimum(CONFIG.rows, shape.out_height - top) + 1)):
        y = tl.minimum(tl.maximum(2 * top - 1 + row, 0), shape.conv_height - 1)
        x = tl.minimum(tl.maximum(left + tap, 0), shape.conv_width - 1)
        pixel = image + (y * shape.width + x) * 16
        pointer = tl.max_contiguous(tl.multiple_of(pixel[:, None] + within[None, :], [1, PIECE]), [1, PIECE])
        acc = tl.dot(tl.load(pointer), tl.trans(w), out_dtype=tl.int32)
        if FLIP:
            acc = acc ^ flip
        line = tl.maximum(line, acc)
        # Counters change in no branch: addresses of steps ahead follow from them, and branches wait for sums.
        end = tap == 2
        if end:
            best = tl.maximum(best, line)
            if (row > 0) & (row % 2 == 0):
                finish(best, operands, column, top + row // 2 - 1, first, target, shape, FLIP, BEFORE, EMIT)
                best = line
            line = least
        row += tl.where(end, 1, 0)
        tap = tl.where(end, 0, tap + 1)


def window_bytes(weights: GemmWeights, filters: int) -> Tensor:
    """int8 [filters, 256]: taps of 16 bytes; channels and filters beyond the last weigh 0."""
    own, taps, channels = weights.codes.shape
    byte = torch.zeros(filters, taps, PITCH, dtype=torch.int8)
    byte[:own, :, :channels] = centre_bytes(weights.codes, weights.bits, weights.grid).view(torch.int8)
    return byte.flatten(1)


def bind(
    step: PooledStem,
    problem: Problem,
    config: StemPoolConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: GemmWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    multiplier, filters = arrays[step.multiplier], problem.out_channels
    blocks = triton.cdiv(filters, config.block_o) * config.block_o
    flip = torch.nn.functional.pad(-(multiplier < 0).to(torch.int32), (0, blocks - filters))
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    operands = StemOperands(
        buffers[step.input], window_bytes(weights, blocks).to(multiplier.device), flip, weights.offset, multiplier,
        arrays[step.bias],
    )  # fmt: skip
    height, width = pooled(problem.out_height), pooled(problem.out_width)
    read = (problem.height, problem.width, problem.out_height, problem.out_width)
    shape = StemShape(problem.batch * width, filters, *read, height, width)
    before = None if step.before is None else Before(step.before.low, step.before.high, program.stream_dtype)
    run = functools.partial(
        stem_pool_kernel[(stem_pool_tiles(problem, config),)], operands, target, shape,
        FLIP=bool((multiplier < 0).any()), BEFORE=before, EMIT=meta, CONFIG=config,
        **launch_options(config.warps, config.stages), launch_pdl=overlaps(),
    )  # fmt: skip
    return lambda inputs: run()
