"""resize in Triton: bilinear interpolation of a stream, columns first, emitted."""

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
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, begin_step, load_stream
from lbs_kernels.gpu.triton.emit import bind_emit, emit, kernel_view
from lbs_kernels.program.operations import resize_taps
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program, ResizeStep


class ResizeShape(NamedTuple):
    """Sizes read at run time."""

    rows: int  # N * out_height * out_width
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int


class Side(NamedTuple):
    """Of every row (or column) that is written: the two it is made of, int32, and the weight of the second."""

    low: Tensor
    high: Tensor
    weight: Tensor


@triton.jit
def blend(a, b, weight):
    """a * (1 - weight) + b * weight, every operation rounded."""
    return a * (1.0 - weight) + b * weight


@triton.jit
def resize_kernel(x_ptr, target, down, across, shape, EMIT: tl.constexpr, CONFIG: tl.constexpr):
    """Pixels [BLOCK_M] by channels [BLOCK_C] of what is written, each of four pixels of the input."""
    begin_step()
    DTYPE: tl.constexpr = EMIT.stream_dtype
    channels = shape.channels
    channel_blocks = (channels + CONFIG.block_c - 1) // CONFIG.block_c
    program = tl.program_id(0)
    row = (program // channel_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    first = (program % channel_blocks) * CONFIG.block_c
    channel = first + tl.arange(0, CONFIG.block_c)
    row_mask = row < shape.rows
    mask = row_mask[:, None] & (channel < channels)[None, :]
    pixels = shape.out_height * shape.out_width
    out_y, out_x = row % pixels // shape.out_width, row % shape.out_width
    image = row // pixels * shape.height
    top = (image + tl.load(down.low + out_y)) * shape.width
    bottom = (image + tl.load(down.high + out_y)) * shape.width
    left, right = tl.load(across.low + out_x), tl.load(across.high + out_x)
    over, along = tl.load(down.weight + out_y)[:, None], tl.load(across.weight + out_x)[:, None]
    start = x_ptr + channel[None, :]
    upper = blend(
        load_stream(start + ((top + left) * channels)[:, None], mask, DTYPE),
        load_stream(start + ((top + right) * channels)[:, None], mask, DTYPE),
        along,
    )
    lower = blend(
        load_stream(start + ((bottom + left) * channels)[:, None], mask, DTYPE),
        load_stream(start + ((bottom + right) * channels)[:, None], mask, DTYPE),
        along,
    )
    emit(blend(upper, lower, over), row, row_mask, first, channels, target, EMIT)


def side_of(size: int, count: int, scale: float, offset: float, device: torch.device) -> Side:
    """The table of one side on the device."""
    low, high, weight = resize_taps(size, count, scale, offset)
    return Side(low.int().to(device), high.int().to(device), weight.to(device))


def bind(
    step: ResizeStep,
    problem: Problem,
    config: ElementwiseConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    source, x = program.tensors[step.input], buffers[step.input]
    sizes = zip((source.height, source.width), step.size, step.scale, step.offset, strict=True)
    down, across = (side_of(*side, x.device) for side in sizes)
    shape = ResizeShape(problem.rows, source.channels, source.height, source.width, *step.size)
    grid = (triton.cdiv(shape.rows, config.block_m) * triton.cdiv(shape.channels, config.block_c),)
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    common = {"EMIT": meta, "CONFIG": config, "num_warps": config.warps, "launch_pdl": overlaps(), **LAUNCH_OPTIONS}
    run = functools.partial(resize_kernel[grid], kernel_view(x), target, down, across, shape, **common)
    return lambda inputs: run()
