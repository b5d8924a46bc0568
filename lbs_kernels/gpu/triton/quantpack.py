"""quantpack in Triton: read an image (channels first or last, floats or bytes) or a stream, and emit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.stem import FoldedStep
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, begin_step, fma, load_stream
from lbs_kernels.gpu.triton.emit import bind_emit, emit, kernel_view
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program, QuantPackStep


class SourceShape(NamedTuple):
    """Sizes read at run time. The steps are those of an image: elements between two channels, and two pixels."""

    rows: int  # N * pixels that are written
    channels: int  # of a pixel that is written
    pixels: int  # of an image that is read
    channel_step: int
    pixel_step: int
    height: int  # of the image that is read; what follows is of folded pixels (gpu/stem.py)
    width: int
    out_height: int
    out_width: int
    shift_h: int
    shift_w: int


@triton.jit
def quantpack_kernel(
    x_ptr, multiplier_ptr, bias_ptr, target, shape,
    IMAGE: tl.constexpr, FOLD: tl.constexpr, AFFINE: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr
):  # fmt: skip
    """One tile of pixels and channels. x: float32 or uint8 [N, C, pixels] or [N, pixels, C] if IMAGE, else a stream
    [rows, C]; multiplier and bias [C] if AFFINE. FOLD: a pixel that is written is two by two of the image.
    """
    begin_step()
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
    if FOLD:
        own = channels // 4
        inner, place = channel % own, channel // own
        pixel = row % (shape.out_height * shape.out_width)
        down = (2 * (pixel // shape.out_width) - shape.shift_h)[:, None] + (place // 2)[None, :]
        across = (2 * (pixel % shape.out_width) - shape.shift_w)[:, None] + (place % 2)[None, :]
        mask = mask & (down >= 0) & (down < shape.height) & (across >= 0) & (across < shape.width)
        start = (row // (shape.out_height * shape.out_width) * (own * shape.pixels))[:, None]
        start += (down * shape.width + across) * shape.pixel_step
        y = tl.load(x_ptr + start + inner[None, :] * shape.channel_step, mask=mask, other=0).to(tl.float32)
        channel = inner
    elif IMAGE:
        start = row // shape.pixels * (channels * shape.pixels) + row % shape.pixels * shape.pixel_step
        y = tl.load(x_ptr + start[:, None] + channel[None, :] * shape.channel_step, mask=mask, other=0).to(tl.float32)
    else:
        y = load_stream(x_ptr + row[:, None] * channels + channel[None, :], mask, DTYPE)
    if AFFINE:
        multiplier = tl.load(multiplier_ptr + channel, mask=column_mask, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=column_mask, other=0.0)
        y = fma(y, multiplier[None, :], bias[None, :])
    if FOLD:
        y = tl.where(mask, y, 0.0)  # whose code is that of 0, which pads
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
    size, out_channels, shift = (problem.height, problem.width), channels, (0, 0)
    fold = isinstance(step, FoldedStep)
    if isinstance(step, FoldedStep):
        written = program.tensors[step.emit.consumers[0].tensor]
        size, out_channels, shift = (written.height, written.width), written.channels, step.shift
    rest = (problem.height, problem.width, *size, *shift)
    rows = problem.batch * size[0] * size[1]
    first = SourceShape(rows, out_channels, pixels, pixels, 1, *rest)
    last = SourceShape(rows, out_channels, pixels, 1, channels, *rest)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(out_channels, config.block_c),)
    position = program.inputs.index(step.input) if step.input in program.inputs else None
    pdl = overlaps()

    def launch(inputs: list[Tensor]) -> None:
        x = kernel_view(buffers[step.input]) if position is None else inputs[position]
        quantpack_kernel[grid](
            x, multiplier, bias, target, first if x.is_contiguous() else last,
            IMAGE=position is not None, FOLD=fold, AFFINE=multiplier is not None, EMIT=meta, CONFIG=config,
            num_warps=config.warps, launch_pdl=pdl, **LAUNCH_OPTIONS,
        )  # fmt: skip

    return launch
