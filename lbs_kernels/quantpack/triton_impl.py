"""quantpack in Triton: read an image (channels first) or a stream, and emit it."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.problem import Problem
from lbs_kernels.program import Program, QuantPackStep
from lbs_kernels.quantpack import tuning
from lbs_kernels.triton_common import LAUNCH_OPTIONS, Launch, load_stream
from lbs_kernels.triton_emit import bind_emit, emit, kernel_view


@triton.jit
def quantpack_kernel(
    x_ptr, target, rows, channels, pixels, IMAGE: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr
):
    """One tile of pixels and channels. x: float32 [N, C, pixels] if IMAGE, else a stream [rows, C]."""
    DTYPE: tl.constexpr = EMIT.stream_dtype
    channel_blocks = (channels + CONFIG.block_c - 1) // CONFIG.block_c
    program = tl.program_id(0)
    row = (program // channel_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    first = (program % channel_blocks) * CONFIG.block_c
    channel = first + tl.arange(0, CONFIG.block_c)
    row_mask = row < rows
    mask = row_mask[:, None] & (channel < channels)[None, :]
    if IMAGE:
        image = row // pixels
        index = (image * channels)[:, None] * pixels + channel[None, :] * pixels + (row % pixels)[:, None]
        y = tl.load(x_ptr + index, mask=mask, other=0.0)
    else:
        y = load_stream(x_ptr + row[:, None] * channels + channel[None, :], mask, DTYPE)
    emit(y, row, row_mask, first, channels, target, EMIT)


def supports(problem: Problem) -> str | None:
    """Why this back end cannot serve `problem`, or None."""
    return None


def bind(
    step: QuantPackStep,
    problem: Problem,
    config: tuning.Config,
    program: Program,
    arrays: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step; an image is taken from the region's inputs, which must be contiguous."""
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    pixels = problem.height * problem.width
    rows = problem.batch * pixels
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(problem.in_channels, config.block_c),)
    position = program.inputs.index(step.input) if step.input in program.inputs else None

    def launch(inputs: list[Tensor]) -> None:
        x = kernel_view(buffers[step.input]) if position is None else inputs[position]
        quantpack_kernel[grid](
            x, target, rows, problem.in_channels, pixels,
            IMAGE=position is not None, EMIT=meta, CONFIG=config, num_warps=config.warps, **LAUNCH_OPTIONS,
        )  # fmt: skip

    return launch
