"""pool in Triton: the maximum over a window, of codes or of a stream, and means of a stream in the defined order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.layout import BYTE_BITS, pixel_elements
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, begin_step, load_stream
from lbs_kernels.gpu.triton.emit import bind_emit, emit, kernel_view
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import PoolStep, Program, TensorSpec

MEAN_STAGES, MEAN_BYTES = 8, 48 * 1024  # pixels of a mean on their way, and shared memory for them at most


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
def plane(pointer, stride, mask, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Words [BLOCK_M, BLOCK_WORDS] of plane INDEX, 0 if there is no such plane."""
    if INDEX < BITS:
        words = tl.load(pointer + INDEX * stride, mask=mask, other=0)
    else:
        words = tl.zeros(pointer.shape, dtype=tl.int32)
    return words


@triton.jit
def max_planes_kernel(
    x_ptr, out_ptr, shape, BITS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CONFIG: tl.constexpr
):
    """Maximum of codes of up to 7 bits, 32 channels at once: two logical instructions for each plane and tap.

    larger = (a > b), from the lowest plane up: where plane p differs it decides, where it does not the planes below do.
    Padding reads as code 0 and so never wins.
    """
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_WORDS: tl.constexpr = (CONFIG.block_c + 31) // 32
    row, first = pool_tile(shape.rows, shape.channels, CONFIG)
    words = (shape.channels + 31) // 32
    word = first // 32 + tl.arange(0, BLOCK_WORDS)
    there = (word < words)[None, :]
    b0 = tl.zeros([BLOCK_M, BLOCK_WORDS], dtype=tl.int32)
    b1, b2, b3, b4, b5, b6 = b0, b0, b0, b0, b0, b0
    for tap in range(KERNEL_H * KERNEL_W):
        pixel, inside = window_pixel(row, row < shape.rows, tap // KERNEL_W, tap % KERNEL_W, shape)
        start = x_ptr + pixel[:, None] * shape.pitch + word[None, :]
        mask = inside[:, None] & there
        a0, a1 = plane(start, words, mask, 0, BITS), plane(start, words, mask, 1, BITS)
        a2, a3 = plane(start, words, mask, 2, BITS), plane(start, words, mask, 3, BITS)
        a4, a5 = plane(start, words, mask, 4, BITS), plane(start, words, mask, 5, BITS)
        a6 = plane(start, words, mask, 6, BITS)
        larger = a0 & ~b0
        larger = (a1 & ~b1) | (~(a1 ^ b1) & larger)
        larger = (a2 & ~b2) | (~(a2 ^ b2) & larger)
        larger = (a3 & ~b3) | (~(a3 ^ b3) & larger)
        larger = (a4 & ~b4) | (~(a4 ^ b4) & larger)
        larger = (a5 & ~b5) | (~(a5 ^ b5) & larger)
        larger = (a6 & ~b6) | (~(a6 ^ b6) & larger)
        b0, b1 = (a0 & larger) | (b0 & ~larger), (a1 & larger) | (b1 & ~larger)
        b2, b3 = (a2 & larger) | (b2 & ~larger), (a3 & larger) | (b3 & ~larger)
        b4, b5 = (a4 & larger) | (b4 & ~larger), (a5 & larger) | (b5 & ~larger)
        b6 = (a6 & larger) | (b6 & ~larger)
    target = out_ptr + row[:, None] * shape.pitch + word[None, :]
    mask = (row < shape.rows)[:, None] & there
    tl.store(target, b0, mask=mask)
    tl.store(target + words, b1, mask=mask & (BITS > 1))
    tl.store(target + 2 * words, b2, mask=mask & (BITS > 2))
    tl.store(target + 3 * words, b3, mask=mask & (BITS > 3))
    tl.store(target + 4 * words, b4, mask=mask & (BITS > 4))
    tl.store(target + 5 * words, b5, mask=mask & (BITS > 5))
    tl.store(target + 6 * words, b6, mask=mask & (BITS > 6))


@triton.jit
def max_bytes_kernel(x_ptr, out_ptr, shape, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CONFIG: tl.constexpr):
    """Maximum of codes of 8 bits; their bias does not change their order. Padding reads as code 0 and so never wins."""
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    row, first = pool_tile(shape.rows, shape.channels, CONFIG)
    # Whole pitches: a multiple of 16 bytes, which the loads then have. What lies beyond the channels means nothing.
    pitch = tl.multiple_of(shape.pitch, 16)
    channel = first + tl.arange(0, BLOCK_C)
    there = (channel < pitch)[None, :]
    least = tl.full([BLOCK_M, BLOCK_C], -128, dtype=tl.int8)
    best = least
    for tap in range(KERNEL_H * KERNEL_W):
        pixel, inside = window_pixel(row, row < shape.rows, tap // KERNEL_W, tap % KERNEL_W, shape)
        start = x_ptr + pixel[:, None] * pitch + channel[None, :]
        inside = inside[:, None] & there
        # Not `other=-128`: of the 4 bytes of a register Triton 3.6 sets the lowest to -128 and the rest to -1.
        best = tl.maximum(best, tl.where(inside, tl.load(start, mask=inside, other=0), least))
    mask = (row < shape.rows)[:, None] & there
    tl.store(out_ptr + row[:, None] * pitch + channel[None, :], best, mask=mask)


@triton.jit
def max_stream_kernel(
    x_ptr, target, shape, EMIT: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CONFIG: tl.constexpr
):
    """Maximum of a stream, emitted; a NaN in the window wins, as in torch."""
    begin_step()
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
def average_stream_kernel(
    x_ptr, target, shape, inverse, EMIT: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Mean over windows of a stream: one float32 addition per tap, in row-major order; padding adds 0; emitted."""
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    DTYPE: tl.constexpr = EMIT.stream_dtype
    row, first = pool_tile(shape.rows, shape.channels, CONFIG)
    row_mask = row < shape.rows
    channel = first + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        pixel, inside = window_pixel(row, row_mask, tap // KERNEL_W, tap % KERNEL_W, shape)
        mask = inside[:, None] & (channel < shape.channels)[None, :]
        total += load_stream(x_ptr + pixel[:, None] * shape.channels + channel[None, :], mask, DTYPE)
    emit(total * inverse, row, row_mask, first, shape.channels, target, EMIT)


@triton.jit
def mean_kernel(
    x_ptr, target, rows, channels, pixels, inverse, EMIT: tl.constexpr, STAGES: tl.constexpr, CONFIG: tl.constexpr
):  # fmt: skip
    """Global mean: one float32 addition per pixel, in row-major order, then one multiplication; emitted.

    STAGES: pixels that are on their way at once, as each is waited for in turn.
    """
    begin_step()
    DTYPE: tl.constexpr = EMIT.stream_dtype
    row, first = pool_tile(rows, channels, CONFIG)
    row_mask = row < rows
    channel = first + tl.arange(0, CONFIG.block_c)
    mask = row_mask[:, None] & (channel < channels)[None, :]
    start = x_ptr + (row * pixels)[:, None] * channels + channel[None, :]
    total = load_stream(start, mask, DTYPE)
    for pixel in tl.range(1, pixels, num_stages=STAGES):
        total += load_stream(start + pixel * channels, mask, DTYPE)
    emit(total * inverse, row, row_mask, first, channels, target, EMIT)


def pool_shape(problem: Problem, source: TensorSpec) -> PoolShape:
    """The sizes the maximum reads."""
    return PoolShape(
        problem.rows,
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
    config: ElementwiseConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    source = program.tensors[step.input]
    shape = pool_shape(problem, source)
    grid = (triton.cdiv(shape.rows, config.block_m) * triton.cdiv(shape.channels, config.block_c),)
    common = {"CONFIG": config, "num_warps": config.warps, "launch_pdl": overlaps(), **LAUNCH_OPTIONS}
    window = {"KERNEL_H": step.kernel[0], "KERNEL_W": step.kernel[1]}
    x = buffers[step.input]
    if source.form == "codes":
        out = buffers[step.emit.consumers[0].tensor]
        if source.bits == BYTE_BITS:
            run = functools.partial(max_bytes_kernel[grid], x, out, shape, **window, **common)
        else:
            run = functools.partial(max_planes_kernel[grid], x, out, shape, BITS=source.bits, **window, **common)
        return lambda inputs: run()
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    if step.kind == "max":
        run = functools.partial(max_stream_kernel[grid], kernel_view(x), target, shape, EMIT=meta, **window, **common)
    elif step.kind == "average":
        inverse = float(torch.tensor(1.0 / (step.kernel[0] * step.kernel[1]), dtype=torch.float32))
        operands = (kernel_view(x), target, shape, inverse)
        run = functools.partial(average_stream_kernel[grid], *operands, EMIT=meta, **window, **common)
    else:
        pixels = problem.height * problem.width
        inverse = float(torch.tensor(1.0 / pixels, dtype=torch.float32))
        sizes = (problem.batch, problem.in_channels, pixels, inverse)
        stages = max(1, min(MEAN_STAGES, MEAN_BYTES // (4 * config.block_m * config.block_c)))
        common["STAGES"] = stages
        run = functools.partial(mean_kernel[grid], kernel_view(x), target, *sizes, EMIT=meta, **common)
    return lambda inputs: run()
