"""pool in Triton: the maximum over a window, of codes or of a stream, and the global mean in the defined order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu_layout import pixel_elements
from lbs_kernels.pool import tuning
from lbs_kernels.problem import Problem
from lbs_kernels.program import PoolStep, Program, TensorSpec
from lbs_kernels.triton_common import LAUNCH_OPTIONS, Launch, load_stream, store_planes, unpack_planes
from lbs_kernels.triton_emit import bind_emit, emit, kernel_view


class PoolShape(NamedTuple):
    """Sizes read at run time. `pitch` is the distance of two pixels of x in its elements."""

    rows: int  # N * OH * OW
    channels: int
    pitch: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int


@triton.jit
def pool_tile(rows, channels, CONFIG: tl.constexpr):
    """Pixels [BLOCK_M] and first channel of this program."""
    channel_blocks = (channels + CONFIG.block_c - 1) // CONFIG.block_c
    program = tl.program_id(0)
    row = (program // channel_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    return row, (program % channel_blocks) * CONFIG.block_c


@triton.jit
def window_pixel(row, row_mask, tap_y, tap_x, shape):
    """Index of the input pixel under one tap, and whether it lies inside the image."""
    pixels = shape.out_height * shape.out_width
    in_y = (row % pixels) // shape.out_width * shape.stride_h - shape.pad_h + tap_y
    in_x = row % shape.out_width * shape.stride_w - shape.pad_w + tap_x
    inside = row_mask & (in_y >= 0) & (in_y < shape.height) & (in_x >= 0) & (in_x < shape.width)
    return (row // pixels * shape.height + in_y) * shape.width + in_x, inside


@triton.jit
def max_codes_kernel(
    x_ptr, out_ptr, shape, BITS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CONFIG: tl.constexpr
):
    """Maximum of codes: planes [.., BITS, CW], or bytes for 8 bits, whose bias does not change their order."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_WORDS: tl.constexpr = (BLOCK_C + 31) // 32
    row, first = pool_tile(shape.rows, shape.channels, CONFIG)
    row_mask = row < shape.rows
    words = (shape.channels + 31) // 32
    word = first // 32 + tl.arange(0, BLOCK_WORDS)
    channel = first + tl.arange(0, CONFIG.block_c)
    if BITS == 8:
        best = tl.full([BLOCK_M, BLOCK_C], -128, dtype=tl.int32)
    else:
        best = tl.zeros([BLOCK_M, BLOCK_WORDS * 32], dtype=tl.int32)
    for tap in range(KERNEL_H * KERNEL_W):
        pixel, inside = window_pixel(row, row_mask, tap // KERNEL_W, tap % KERNEL_W, shape)
        start = x_ptr + pixel[:, None] * shape.pitch
        # Padding reads as the smallest code and so never wins.
        if BITS == 8:
            mask = inside[:, None] & (channel < shape.channels)[None, :]
            codes = tl.load(start + channel[None, :], mask=mask, other=-128).to(tl.int32)
        else:
            codes = unpack_planes(start + word[None, :], words, inside[:, None] & (word < words)[None, :], BITS)
        best = tl.maximum(best, codes)
    if BITS == 8:
        mask = row_mask[:, None] & (channel < shape.channels)[None, :]
        tl.store(out_ptr + row[:, None] * shape.pitch + channel[None, :], best.to(tl.int8), mask=mask)
    else:
        store_planes(out_ptr, best, row, row_mask, first, shape.channels, BITS)


@triton.jit
def max_stream_kernel(
    x_ptr, target, shape, EMIT: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CONFIG: tl.constexpr
):
    """Maximum of a stream, emitted; a NaN in the window wins, as in torch."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    DTYPE: tl.constexpr = EMIT.stream_dtype
    row, first = pool_tile(shape.rows, shape.channels, CONFIG)
    row_mask = row < shape.rows
    channel = first + tl.arange(0, BLOCK_C)
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), dtype=tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        pixel, inside = window_pixel(row, row_mask, tap // KERNEL_W, tap % KERNEL_W, shape)
        mask = inside[:, None] & (channel < shape.channels)[None, :]
        values = load_stream(x_ptr + pixel[:, None] * shape.channels + channel[None, :], mask, DTYPE)
        values = tl.where(mask, values, float("-inf"))
        best = tl.maximum(best, values, propagate_nan=tl.PropagateNan.ALL)
    emit(best, row, row_mask, first, shape.channels, target, EMIT)


@triton.jit
def mean_kernel(x_ptr, target, rows, channels, pixels, inverse, EMIT: tl.constexpr, CONFIG: tl.constexpr):
    """Global mean: one float32 addition per pixel, in row-major order, then one multiplication; emitted."""
    DTYPE: tl.constexpr = EMIT.stream_dtype
    row, first = pool_tile(rows, channels, CONFIG)
    row_mask = row < rows
    channel = first + tl.arange(0, CONFIG.block_c)
    mask = row_mask[:, None] & (channel < channels)[None, :]
    start = x_ptr + (row * pixels)[:, None] * channels + channel[None, :]
    total = load_stream(start, mask, DTYPE)
    for pixel in range(1, pixels):
        total += load_stream(start + pixel * channels, mask, DTYPE)
    emit(total * inverse, row, row_mask, first, channels, target, EMIT)


def supports(problem: Problem) -> str | None:
    """Why this back end cannot serve `problem`, or None."""
    return None


def pool_shape(problem: Problem, source: TensorSpec) -> PoolShape:
    """The sizes the maximum reads."""
    return PoolShape(
        problem.batch * problem.out_height * problem.out_width,
        problem.in_channels,
        pixel_elements(source),
        problem.height,
        problem.width,
        problem.out_height,
        problem.out_width,
        *problem.stride,
        *problem.padding,
    )


def bind(
    step: PoolStep,
    problem: Problem,
    config: tuning.Config,
    program: Program,
    arrays: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    source = program.tensors[step.input]
    shape = pool_shape(problem, source)
    grid = (triton.cdiv(shape.rows, config.block_m) * triton.cdiv(shape.channels, config.block_c),)
    common = {"CONFIG": config, "num_warps": config.warps, **LAUNCH_OPTIONS}
    window = {"KERNEL_H": step.kernel[0], "KERNEL_W": step.kernel[1]}
    x = buffers[step.input]
    if source.form == "codes":
        out = buffers[step.emit.consumers[0].tensor]
        run = functools.partial(max_codes_kernel[grid], x, out, shape, BITS=source.bits, **window, **common)
        return lambda inputs: run()
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    if step.kind == "max":
        run = functools.partial(max_stream_kernel[grid], kernel_view(x), target, shape, EMIT=meta, **window, **common)
    else:
        pixels = problem.height * problem.width
        inverse = float(torch.tensor(1.0 / pixels, dtype=torch.float32))
        sizes = (problem.batch, problem.in_channels, pixels, inverse)
        run = functools.partial(mean_kernel[grid], kernel_view(x), target, *sizes, EMIT=meta, **common)
    return lambda inputs: run()
