"""A depthwise 3 x 3 window and the 1 x 1 layer behind it in one kernel: the codes between them go to no memory.

A program takes strips of columns as gpu/triton/depthwise_columns.py does, and goes through their channels, BLOCK_C in a
step. The codes of a step, [BLOCK_M * strip pixels, BLOCK_C] bytes, are operand A of the product with the weights of the
1 x 1 layer, and every sum of the tile is in registers until the last step. So a program has all filters: a second block
of them would compute the codes again.

Channels beyond the last meet weights of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig, project_tiles
from lbs_kernels.gpu.configs.direct import column_rows
from lbs_kernels.gpu.depthwise_project import ProjectedDepthwise
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.triton.common import begin_step, fma
from lbs_kernels.gpu.triton.depthwise_columns import (
    column_registers,
    columns_meta,
    line_of,
    load_column,
    load_four,
    row_of,
)
from lbs_kernels.gpu.triton.emit import biased_bytes, bind_emit, coded, emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, gemm_shape, launch_options, operand_scales, workspace
from lbs_kernels.gpu.triton.gemm import prepare_weights as prepare_gemm
from lbs_kernels.gpu.triton.gemm_kernel import GemmOperands
from lbs_kernels.gpu.weights import centre_bytes
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program

__all__ = ["bind", "prepare_step"]


class ProjectOperands(NamedTuple):
    """Pointers of the 1 x 1 layer. Filters are padded to the block in w."""

    w: Tensor  # int8 [steps, BLOCK_O + REST, BLOCK_C]
    offset: Tensor  # int32 [O]
    multiplier: Tensor  # float32 [O]
    bias: Tensor  # float32 [O]


class ProjectMeta(NamedTuple):
    """What the compiler knows of the 1 x 1 layer."""

    dot_scale: int
    run: int  # a power of two that divides the filters, so that neighbours are stored at once


@dataclass(frozen=True)
class ProjectedWeights:
    """Weights of both layers, as their own kernels have them."""

    depthwise: GemmWeights
    project: GemmWeights


@triton.jit
def code_bytes(acc, multiplier, bias, column, shape, between, BETWEEN: tl.constexpr):
    """int8 [BLOCK_M, BLOCK_C] of the sums of one output of every position."""
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    ZERO: tl.constexpr = BETWEEN.consumers[0].zero
    return biased_bytes(coded(y, column, shape.channels, between, BETWEEN, 0), ZERO)


@triton.jit
def with_tile(tiles, tile):
    """The tiles and one more."""
    return tiles + (tile,)  # noqa: RUF005  Triton adds tuples, it does not unpack them


@triton.jit
def stacked(tiles, COUNT: tl.constexpr):
    """[R, C, 2, 2, ..] of COUNT tiles [R, C]; the last dimension is the first half or the second."""
    if COUNT == 1:
        result = tiles[0]
    else:
        result = tl.join(stacked(tiles[: COUNT // 2], COUNT // 2), stacked(tiles[COUNT // 2 :], COUNT // 2))
    return result


@triton.jit
def operand_of(tiles, COUNT: tl.constexpr, CONFIG: tl.constexpr):
    """int8 [COUNT * BLOCK_M, BLOCK_C] of COUNT tiles [BLOCK_M, BLOCK_C], as a fragment of the tensor core has them.

    A thread has a quarter of the channels of one position, of eight in its warp. Its rows and bytes are those that it
    feeds to the tensor core: nothing moves between threads. Row ((h * WARPS + warp) * 2 + l) * 8 + lane is that of
    tile 2 h + l and position warp * 8 + lane, byte 16 j + 4 q + i that of channel (BLOCK_C / 4) q + 4 j + i.
    """
    BLOCK_C: tl.constexpr = CONFIG.block_c
    WARPS: tl.constexpr = CONFIG.warps
    x = stacked(tiles, COUNT)
    if COUNT == 2:
        x = tl.permute(x, (2, 0, 1))
    elif COUNT == 4:
        x = tl.permute(x, (3, 2, 0, 1))
    elif COUNT == 8:
        x = tl.permute(x, (4, 3, 2, 0, 1))
    elif COUNT == 16:
        x = tl.permute(x, (5, 4, 3, 2, 0, 1))
    x = tl.reshape(x, [COUNT // 2, 2, WARPS, 8, BLOCK_C])
    x = tl.permute(x, (0, 2, 1, 3, 4))
    x = tl.reshape(x, [COUNT * WARPS * 8, 4, BLOCK_C // 16, 4])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [COUNT * WARPS * 8, BLOCK_C])


@triton.jit
def rows_of(position, COUNT: tl.constexpr, CONFIG: tl.constexpr):
    """[COUNT * BLOCK_M] of [BLOCK_M]: what a position has, for the rows of `operand_of`."""
    x = tl.reshape(position, [1, CONFIG.warps, 1, 8])
    return tl.reshape(tl.broadcast_to(x, [COUNT // 2, CONFIG.warps, 2, 8]), [COUNT * CONFIG.warps * 8])


@triton.jit
def strip_codes(
    operands, image, y, x, first, multiplier, bias, shape, between,
    META: tl.constexpr, BETWEEN: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """int8 [pixels, BLOCK_C] of channels `first` on, of every column of a strip and both its rows (`operand_of`)."""
    COLUMNS: tl.constexpr = CONFIG.columns
    STEP: tl.constexpr = META.step
    ROWS: tl.constexpr = 3 - STEP
    pitch = tl.multiple_of(shape.pitch // 4, 4)
    registers = (shape.channels + CONFIG.block_c - 1) // CONFIG.block_c * (CONFIG.block_c // 4)
    register = first // 4 + tl.arange(0, CONFIG.block_c // 4)
    column = first + tl.arange(0, CONFIG.block_c)
    there = register < pitch
    u0, u1, u2, u3 = load_four(operands.w + register, registers, there, False)
    v0, v1, v2, v3 = load_four(operands.w + 4 * registers + register, registers, there, False)
    w0, w1, w2, w3 = load_four(operands.w + 8 * registers + register, registers, there, False)
    o0, o1, o2, o3 = load_four(operands.offset + register, registers, there, False)
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
    tiles = ()
    for j in tl.static_range(COLUMNS):
        if STEP == 2:
            b0, b1, b2, b3 = load_column(
                l0, l1, l2, l3, s0, s1, s2, s3, x + (2 * j + 1), there, operands, register, shape, META,
                not META.exact, ROWS,
            )  # fmt: skip
        c0, c1, c2, c3 = load_column(
            l0, l1, l2, l3, s0, s1, s2, s3, x + (STEP * j + 2), there, operands, register, shape, META,
            (j == COLUMNS - 1) or not META.exact, ROWS,
        )  # fmt: skip
        acc = row_of(
            a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, u0, u1, u2, u3, v0, v1, v2, v3, w0, w1, w2, w3,
            o0, o1, o2, o3, 0, CONFIG,
        )  # fmt: skip
        tiles = with_tile(tiles, code_bytes(acc, multiplier, bias, column, shape, between, BETWEEN))
        if ROWS == 2:
            acc = row_of(
                a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, u0, u1, u2, u3, v0, v1, v2, v3, w0, w1, w2, w3,
                o0, o1, o2, o3, 8, CONFIG,
            )  # fmt: skip
            tiles = with_tile(tiles, code_bytes(acc, multiplier, bias, column, shape, between, BETWEEN))
        if STEP == 1:
            a0, a1, a2, a3 = b0, b1, b2, b3
            b0, b1, b2, b3 = c0, c1, c2, c3
        else:
            a0, a1, a2, a3 = c0, c1, c2, c3
    return operand_of(tiles, ROWS * COLUMNS, CONFIG)


@triton.jit
def finish(acc, first, filters, project, pixel, inside, target, PROJECT: tl.constexpr, EMIT: tl.constexpr):
    """The epilogue of these filters."""
    column = first + tl.arange(0, acc.shape[1])
    mask = column < filters
    acc = acc * PROJECT.dot_scale + tl.load(project.offset + column, mask=mask, other=0)[None, :]
    multiplier = tl.load(project.multiplier + column, mask=mask, other=0.0)
    bias = tl.load(project.bias + column, mask=mask, other=0.0)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    emit(y, pixel, inside, first, filters, target, EMIT)


@triton.jit
def place_of(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] places of a block of sums."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def take(place):
    """The sums there, which are left 0."""
    total = tl.load(place, cache_modifier=".cg")
    tl.debug_barrier()  # no thread may clear what another has yet to read
    tl.store(place, tl.zeros_like(total))
    return total


@triton.jit
def depthwise_project_kernel(
    operands, project, split, between, target, shape, runs,
    META: tl.constexpr, PROJECT: tl.constexpr, BETWEEN: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """One tile, BLOCK_M strips, all channels, all filters; or one of CONFIG.split parts of its channels."""
    begin_step()
    BLOCK_M: tl.constexpr = 8 * CONFIG.warps
    BLOCK_C: tl.constexpr = CONFIG.block_c
    BLOCK_O: tl.constexpr = CONFIG.block_o
    REST: tl.constexpr = CONFIG.rest
    COLUMNS: tl.constexpr = CONFIG.columns
    STEP: tl.constexpr = META.step
    ROWS: tl.constexpr = 3 - STEP
    STRIP: tl.constexpr = ROWS * COLUMNS
    strips = (shape.out_width + COLUMNS - 1) // COLUMNS
    lines = (shape.out_height + ROWS - 1) // ROWS
    positions = shape.rows // (shape.out_height * shape.out_width) * lines * strips
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tl.minimum(position, positions - 1)
    image = valid // (lines * strips)
    out_y = valid // strips % lines * ROWS
    out_x = valid % strips * COLUMNS
    y = out_y * STEP - shape.pad_h
    x = out_x * STEP - shape.pad_w
    k = tl.arange(0, BLOCK_C)
    steps = (shape.channels + BLOCK_C - 1) // BLOCK_C
    part = (steps + CONFIG.split - 1) // CONFIG.split
    start = tl.program_id(1) * part
    project_w = project.w + start * ((BLOCK_O + REST) * BLOCK_C)
    w = project_w + tl.arange(0, BLOCK_O)[:, None] * BLOCK_C + k[None, :]
    acc = tl.zeros([BLOCK_M * STRIP, BLOCK_O], dtype=tl.int32)
    if REST > 0:
        rest_w = project_w + (BLOCK_O + tl.arange(0, REST))[:, None] * BLOCK_C + k[None, :]
        rest = tl.zeros([BLOCK_M * STRIP, REST], dtype=tl.int32)
    for step in range(start, tl.minimum(steps, start + part)):
        first = step * BLOCK_C
        multiplier = tl.load(operands.multiplier + first + k)
        bias = tl.load(operands.bias + first + k)
        codes = strip_codes(
            operands, image, y, x, first, multiplier, bias, shape, between, META, BETWEEN, CONFIG
        )  # fmt: skip
        acc = tl.dot(codes, tl.trans(tl.load(w)), acc, out_dtype=tl.int32)
        w += (BLOCK_O + REST) * BLOCK_C
        if REST > 0:
            rest = tl.dot(codes, tl.trans(tl.load(rest_w)), rest, out_dtype=tl.int32)
            rest_w += (BLOCK_O + REST) * BLOCK_C
    filters = runs * PROJECT.run  # which the compiler sees to be a multiple
    # Of the first pixel of a strip, and of those behind it: ROWS below one another, then the next column.
    corner = (image * shape.out_height + out_y) * shape.out_width + out_x
    within = tl.arange(0, BLOCK_M * STRIP)
    within = within // (2 * BLOCK_M) * 2 + within // 8 % 2
    below, beside = within % ROWS, within // ROWS
    pixel = rows_of(corner, STRIP, CONFIG) + below * shape.out_width + beside
    inside = rows_of(position, STRIP, CONFIG) < positions
    if not META.exact:
        inside = inside & (rows_of(out_x, STRIP, CONFIG) + beside < shape.out_width)
    if ROWS == 2:
        inside = inside & (rows_of(out_y, STRIP, CONFIG) + below < shape.out_height)
    if CONFIG.split == 1:
        finish(acc, 0, filters, project, pixel, inside, target, PROJECT, EMIT)
        if REST > 0:
            finish(rest, BLOCK_O, filters, project, pixel, inside, target, PROJECT, EMIT)
    else:
        own = tl.program_id(0) * (BLOCK_M * STRIP * (BLOCK_O + REST))
        place = split.partial + own + place_of(BLOCK_M * STRIP, BLOCK_O)
        tl.atomic_add(place, acc, sem="relaxed")
        if REST > 0:
            rest_place = split.partial + own + BLOCK_M * STRIP * BLOCK_O + place_of(BLOCK_M * STRIP, REST)
            tl.atomic_add(rest_place, rest, sem="relaxed")
        # As in gpu/triton/gemm_kernel.py: every thread's additions, then the count.
        tl.debug_barrier()
        before = tl.atomic_add(split.arrived + tl.program_id(0), 1, sem="acq_rel")
        if before == CONFIG.split - 1:
            finish(take(place), 0, filters, project, pixel, inside, target, PROJECT, EMIT)
            if REST > 0:
                finish(take(rest_place), BLOCK_O, filters, project, pixel, inside, target, PROJECT, EMIT)
            tl.store(split.arrived + tl.program_id(0), 0)


def prepare_step(
    step: ProjectedDepthwise, program: Program, arrays: Mapping[str, Tensor], device: torch.device
) -> ProjectedWeights:
    """The weights of both layers. Raises FormatError where a sum could overflow."""
    first, between = step.first, step.between(program)
    return ProjectedWeights(
        prepare_gemm(
            arrays[first.planes], first.kernel, first.groups, program.tensors[step.input], device, first.w_grid
        ),
        prepare_gemm(arrays[step.planes], (1, 1), 1, between, device, step.w_grid),
    )


def operand_bytes(weights: GemmWeights, config: ProjectConfig) -> Tensor:
    """int8 [steps, filters of a tile, BLOCK_C], channels in the order of `operand_of`; beyond the last all is 0."""
    filters, _, channels = weights.codes.shape
    steps, rows = -(-channels // config.block_c), config.filters
    byte = torch.zeros(rows, steps * config.block_c, dtype=torch.uint8)
    byte[:filters, :channels] = centre_bytes(weights.codes.squeeze(1), weights.bits, weights.grid)
    byte = byte.reshape(rows, steps, 4, config.block_c // 16, 4).permute(1, 0, 3, 2, 4)
    return byte.reshape(steps, rows, config.block_c).contiguous().view(torch.int8)


def bind(
    step: ProjectedDepthwise,
    problem: Problem,
    config: ProjectConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: ProjectedWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed."""
    first, own, source = step.first, weights.depthwise, program.tensors[step.input]
    channels, device = source.channels, buffers[step.input].device
    beyond = (0, -channels % config.block_c)
    codes = torch.nn.functional.pad(own.codes.squeeze(-1), (0, 0, *beyond))
    taps = column_registers(codes, own.bits, own.grid).to(device)
    offset, multiplier, bias = (
        torch.nn.functional.pad(row, beyond) for row in (own.offset, arrays[first.multiplier], arrays[first.bias])
    )
    operands = GemmOperands(
        buffers[step.input].view(torch.int32), own.padding.view(torch.int32), taps,
        offset.reshape(-1, 4).T.contiguous(), multiplier, bias,
    )  # fmt: skip
    project = ProjectOperands(
        operand_bytes(weights.project, config).to(device), weights.project.offset, arrays[step.multiplier],
        arrays[step.bias],
    )  # fmt: skip
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    # The codes between have a place and a scale like all others, but are stored nowhere.
    nowhere = {first.emit.consumers[0].tensor: project.w}
    between, facts = bind_emit(first.emit, program, arrays, nowhere)
    filters = problem.out_channels
    run = filters & -filters
    split = None
    if config.split > 1:
        pixels = config.block_m * config.columns * column_rows(problem)
        split = workspace(project_tiles(problem, config), pixels * config.filters, device)
    launch = functools.partial(
        depthwise_project_kernel[(project_tiles(problem, config), config.split)],
        operands, project, split, between.consumers[0], target, gemm_shape(problem, source), filters // run,
        META=columns_meta(problem, config), PROJECT=ProjectMeta(operand_scales(weights.project)[0], run),
        BETWEEN=facts, EMIT=meta, CONFIG=config,
        **launch_options(config.warps, 1), launch_pdl=overlaps(),
    )  # fmt: skip
    return lambda inputs: launch()
