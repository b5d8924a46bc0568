"""quantpack in Triton: read an image (channels first or last, floats or bytes) or a stream, and emit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, fma, load_stream
from lbs_kernels.gpu.triton.emit import bind_emit, emit, kernel_view
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program, QuantPackStep


class SourceShape(NamedTuple):
    """Sizes read at run time. The steps are those of an image: elements between two channels, and two pixels."""

    rows: int  # N * pixels
    channels: int
    pixels: int
    channel_step: int
    pixel_step: int


@triton.jit
def quantpack_kernel(
    x_ptr, multiplier_ptr, bias_ptr, target, shape,
    IMAGE: tl.constexpr, AFFINE: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr
):  # fmt: skip
    """One tile of pixels and channels. x: float32 or uint8 [N, C, pixels] or [N, pixels, C] if IMAGE, else a stream
    [rows, C]; multiplier and bias [C] if AFFINE.
    """
    DTYPE: tl.constexpr = EMIT.stream_dtype
    channels = shape.channels
    channel_blocks = (channels + CONFIG.block_c - 1) // CONFIG.block_c
    program = tl.program_id(0)
    row = (program // channel_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    first = (program % channel_blocks) * CONFIG.block_c
    channel = first + tl.arange(0, CONFIG.block_c)
    row_mask = row < shape.rows
    column_mask = channel < channels
    mask = row_mask[:, None] & column_mask[None, :]
    if IMAGE:
        start = row // shape.pixels * (channels * shape.pixels) + row % shape.pixels * shape.pixel_step
        y = tl.load(x_ptr + start[:, None] + channel[None, :] * shape.channel_step, mask=mask, other=0).to(tl.float32)
    else:
        y = load_stream(x_ptr + row[:, None] * channels + channel[None, :], mask, DTYPE)
    if AFFINE:
        multiplier = tl.load(multiplier_ptr + channel, mask=column_mask, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=column_mask, other=0.0)
        y = fma(y, multiplier[None, :], bias[None, :])
    emit(y, row, row_mask, first, channels, target, EMIT)


def bind(
    step: QuantPackStep,
    problem: Problem,
    config: ElementwiseConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step; an image is taken from the region's inputs, whose channels lie first or last."""
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    multiplier, bias = (None if key is None else arrays[key] for key in (step.multiplier, step.bias))
    channels, pixels = problem.in_channels, problem.height * problem.width
    rows = problem.batch * pixels
    first, last = SourceShape(rows, channels, pixels, pixels, 1), SourceShape(rows, channels, pixels, 1, channels)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(channels, config.block_c),)
    position = program.inputs.index(step.input) if step.input in program.inputs else None

    def launch(inputs: list[Tensor]) -> None:
        x = kernel_view(buffers[step.input]) if position is None else inputs[position]
        quantpack_kernel[grid](
            x, multiplier, bias, target, first if x.is_contiguous() else last,
            IMAGE=position is not None, AFFINE=multiplier is not None, EMIT=meta, CONFIG=config,
            num_warps=config.warps, **LAUNCH_OPTIONS,
        )  # fmt: skip

    return launch
