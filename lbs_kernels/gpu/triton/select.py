"""select in Triton: channels of several tensors as one, pixels repeated or moved; codes pass, streams are emitted.

All tensors of a program lie in one arena, so a table of addresses, one for each channel (and place of a block, where
pixels are moved), serves any number of inputs.
"""

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
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, begin_step, load_stream, store_planes
from lbs_kernels.gpu.triton.emit import bind_emit, emit, kernel_view
from lbs_kernels.program.planes import WORD, words
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program, SelectStep

# Rows of the table, each [entries] for the channels that are written: elements from the base to the channel in the
# first pixel that is read (of planes: to its word in plane 0), from pixel to pixel, from plane to plane; its bit; rows
# and columns of a pixel, or where pixels are moved, pixels from image to image and from row to row.
START, PITCH, PLANE, BIT, ROWS, COLUMNS = (tl.constexpr(row) for row in range(6))


class SelectShape(NamedTuple):
    """Sizes of what is written. `out_pitch`: elements between two pixels of codes of 8 bits. `entries`: C, or where
    pixels are moved, C for each of the `block_rows * block_columns` places of a block.
    """

    rows: int  # N * height * width
    channels: int
    height: int
    width: int
    out_pitch: int
    entries: int
    block_rows: int
    block_columns: int
    stride_rows: int
    stride_columns: int


@triton.jit
def select_tile(table_ptr, shape, HOW: tl.constexpr, CONFIG: tl.constexpr):
    """Pixels [M], first channel and channels [C] of this program's tile, elements [M, C] from the base to each, and
    their entries [1, C] of the table, or [M, C].
    """
    channels = shape.channels
    channel_blocks = (channels + CONFIG.block_c - 1) // CONFIG.block_c
    program = tl.program_id(0)
    row = (program // channel_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    first = (program % channel_blocks) * CONFIG.block_c
    channel = first + tl.arange(0, CONFIG.block_c)
    entry = channel[None, :]
    there = entry < channels
    pixel = row[:, None].to(tl.int64)
    line, across = (row // shape.width)[:, None], (row % shape.width)[:, None]  # of all images
    if HOW == "move":
        down = line % shape.height
        place = (down % shape.block_rows) * shape.block_columns + across % shape.block_columns
        there = there & (row < shape.rows)[:, None]
        entry = place * channels + entry
        image = tl.load(table_ptr + ROWS * shape.entries + entry, mask=there, other=0)
        width = tl.load(table_ptr + COLUMNS * shape.entries + entry, mask=there, other=0)
        pixel = (line // shape.height) * image + shape.stride_rows * (down // shape.block_rows) * width
        pixel += shape.stride_columns * (across // shape.block_columns)
    elif HOW == "repeat":
        rows = tl.load(table_ptr + ROWS * shape.entries + entry, mask=there, other=1).to(tl.int32)
        columns = tl.load(table_ptr + COLUMNS * shape.entries + entry, mask=there, other=1).to(tl.int32)
        # A whole multiple of `rows` lines is one image.
        pixel = (line // rows).to(tl.int64) * (shape.width // columns) + across // columns
    start = tl.load(table_ptr + START * shape.entries + entry, mask=there, other=0)
    pitch = tl.load(table_ptr + PITCH * shape.entries + entry, mask=there, other=0)
    return row, first, channel, start + pixel * pitch, entry


@triton.jit
def select_bytes_kernel(x_ptr, out_ptr, table_ptr, shape, HOW: tl.constexpr, CONFIG: tl.constexpr):
    """Codes of 8 bits."""
    begin_step()
    row, _, channel, offset, _ = select_tile(table_ptr, shape, HOW, CONFIG)
    mask = (row < shape.rows)[:, None] & (channel < shape.channels)[None, :]
    codes = tl.load(x_ptr + offset, mask=mask, other=0)
    tl.store(out_ptr + row[:, None] * shape.out_pitch + channel[None, :], codes, mask=mask)


@triton.jit
def select_planes_kernel(x_ptr, out_ptr, table_ptr, shape, BITS: tl.constexpr, HOW: tl.constexpr, CONFIG: tl.constexpr):
    """Codes of 1 to 7 bits, taken out of their words and put into others."""
    begin_step()
    row, first, channel, offset, entry = select_tile(table_ptr, shape, HOW, CONFIG)
    mask = (row < shape.rows)[:, None] & (channel < shape.channels)[None, :]
    there = mask if HOW == "move" else (channel < shape.channels)[None, :]
    plane_step = tl.load(table_ptr + PLANE * shape.entries + entry, mask=there, other=0)
    bit = tl.load(table_ptr + BIT * shape.entries + entry, mask=there, other=0).to(tl.int32)
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    codes = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.int32)
    for plane in tl.static_range(BITS):
        word = tl.load(x_ptr + offset + plane * plane_step, mask=mask, other=0)
        codes += ((word >> bit) & 1) << plane
    store_planes(out_ptr, codes, row, row < shape.rows, first, shape.channels, BITS)


@triton.jit
def select_stream_kernel(x_ptr, target, table_ptr, shape, EMIT: tl.constexpr, HOW: tl.constexpr, CONFIG: tl.constexpr):
    """Streams, emitted."""
    begin_step()
    DTYPE: tl.constexpr = EMIT.stream_dtype
    row, first, channel, offset, _ = select_tile(table_ptr, shape, HOW, CONFIG)
    mask = (row < shape.rows)[:, None] & (channel < shape.channels)[None, :]
    y = load_stream(x_ptr + offset, mask, DTYPE)
    emit(y, row, row < shape.rows, first, shape.channels, target, EMIT)


def address_table(step: SelectStep, problem: Problem, program: Program, buffers: Mapping[int, Tensor]) -> Tensor:
    """int64 [6, entries] on the device, see above; the base is the buffer of the first input."""
    base = buffers[step.input]
    columns = []
    for place, index in enumerate(step.inputs):
        spec, buffer = program.tensors[index], buffers[index]
        first = (buffer.data_ptr() - base.data_ptr()) // buffer.element_size()
        narrow = spec.form == "codes" and spec.bits < BYTE_BITS
        sizes = (pixel_elements(spec), words(spec.channels))
        repeat = (problem.height // spec.height, problem.width // spec.width)
        if step.moves:
            repeat = (spec.height * spec.width, spec.width)
            top, left = (values[place] if values else 0 for values in (step.top, step.left))
            first += (top * spec.width + left) * sizes[0]
        for channel in range(spec.channels):
            word, bit = (channel // WORD, channel % WORD) if narrow else (channel, 0)
            columns.append((first + word, *sizes, bit, *repeat))
    chosen = [columns[channel] for channel in step.channels] if step.channels else columns
    return torch.tensor(chosen, dtype=torch.int64, device=base.device).t().contiguous()


def bind(
    step: SelectStep,
    problem: Problem,
    config: ElementwiseConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    source, x, table = program.tensors[step.input], buffers[step.input], address_table(step, problem, program, buffers)
    sizes = {(program.tensors[index].height, program.tensors[index].width) for index in step.inputs}
    how = "move" if step.moves else "copy" if sizes == {(problem.height, problem.width)} else "repeat"
    grid = (triton.cdiv(problem.rows, config.block_m) * triton.cdiv(problem.out_channels, config.block_c),)
    common = {"HOW": how, "CONFIG": config, "num_warps": config.warps, "launch_pdl": overlaps(), **LAUNCH_OPTIONS}
    out_pitch = 0 if source.form == "stream" else pixel_elements(program.tensors[step.emit.consumers[0].tensor])
    places = (table.shape[1], *step.block, *step.stride)
    shape = SelectShape(problem.rows, problem.out_channels, problem.height, problem.width, out_pitch, *places)
    if source.form == "stream":
        target, meta = bind_emit(step.emit, program, arrays, buffers)
        run = functools.partial(select_stream_kernel[grid], kernel_view(x), target, table, shape, EMIT=meta, **common)
        return lambda inputs: run()
    out = buffers[step.emit.consumers[0].tensor]
    if source.bits == BYTE_BITS:
        run = functools.partial(select_bytes_kernel[grid], x, out, table, shape, **common)
    else:
        run = functools.partial(select_planes_kernel[grid], x, out, table, shape, BITS=source.bits, **common)
    return lambda inputs: run()
