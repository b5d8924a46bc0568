"""The half-precision fallback: decode codes to float16, let torch multiply, and finish with the epilogue. NOT exact.

    x = qx - zero, or 2 qx - n_x if signed          exact in float16: integers of at most 8 bits
    w = (2 qw - n_w) 2^-s, or (qw - 2^(b - 1)) 2^-s exact too; s keeps every sum below the largest float16
    acc = float16(sum w x) 2^s                      summed in float32 by the tensor cores, then ROUNDED to 11 bits
    y = fma(acc, M, B); steps 3-6 as everywhere

So acc is off by at most 2^-11 |acc| + K 2^-24 sum |w x|, and codes near a rounding boundary may differ by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.configs.elementwise import elementwise_default
from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.layout import pixel_elements
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, fma
from lbs_kernels.gpu.triton.emit import bind_emit, emit
from lbs_kernels.program.planes import unpack_weights, weight_units
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, TensorSpec, WeightGrid

LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class HalfWeights:
    """w float16 [O, C of one group, kh, kw], channels last, and s."""

    weight: Tensor
    shift: int


@triton.jit
def decode_kernel(
    x_ptr, out_ptr, rows, channels, pitch, BITS: tl.constexpr, ZERO: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x float16 [rows, channels] of planes int32 [rows, BITS, CW], or of biased bytes int8 [rows, pitch]."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    words = (channels + 31) // 32
    program = tl.program_id(0)
    row = (program // words) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = program % words
    channel = word * 32 + tl.arange(0, 32)
    row_mask = row < rows
    mask = row_mask[:, None] & (channel < channels)[None, :]
    if BITS == 8:
        codes = tl.load(x_ptr + row[:, None] * pitch + channel[None, :], mask=mask, other=0).to(tl.int32) + 128
    else:
        codes = tl.zeros([BLOCK_M, 32], dtype=tl.int32)
        for plane in tl.static_range(BITS):
            bits = tl.load(x_ptr + row * pitch + plane * words + word, mask=row_mask, other=0)
            codes = codes | (((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1) << plane)
    value = 2 * codes - LEVELS if SIGNED else codes - ZERO
    tl.store(out_ptr + row[:, None] * channels + channel[None, :], value.to(tl.float16), mask=mask)


@triton.jit
def finish_kernel(
    acc_ptr, multiplier_ptr, bias_ptr, target, rows, filters, scale, EMIT: tl.constexpr, CONFIG: tl.constexpr
):
    """Steps 2-6 of a tile of acc float16 [rows, filters], which is times `scale`."""
    blocks = (filters + CONFIG.block_c - 1) // CONFIG.block_c
    program = tl.program_id(0)
    row = (program // blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    first = (program % blocks) * CONFIG.block_c
    column = first + tl.arange(0, CONFIG.block_c)
    row_mask, column_mask = row < rows, column < filters
    mask = row_mask[:, None] & column_mask[None, :]
    acc = tl.load(acc_ptr + row[:, None] * filters + column[None, :], mask=mask, other=0).to(tl.float32) * scale
    multiplier = tl.load(multiplier_ptr + column, mask=column_mask, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0)
    y = fma(acc, multiplier[None, :], bias[None, :])
    emit(y, row, row_mask, first, filters, target, EMIT)


def prepare_weights(
    planes: Tensor,
    kernel: tuple[int, int],
    groups: int,
    source: TensorSpec,
    device: torch.device,
    grid: WeightGrid = "odd",
) -> HalfWeights:
    """Weights for the activations of `source`, from planes int32 [w_bits, O, T, CW]."""
    w_bits, filters, taps, _ = planes.shape
    channels = source.channels // groups
    largest = taps * channels * ((1 << w_bits) - 1) * ((1 << source.bits) - 1)
    shift = max(0, math.ceil(math.log2(largest / LARGEST)))
    scale, offset = weight_units(w_bits, grid)
    centred = (scale * unpack_weights(planes.cpu(), channels).double() + offset) * 2.0**-shift
    weight = centred.reshape(filters, *kernel, channels).permute(0, 3, 1, 2).half()
    return HalfWeights(weight.contiguous(memory_format=torch.channels_last).to(device), shift)


def product(step: ConvStep | LinearStep, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The sums of one step in torch, from x float16 [N, C, H, W] channels last."""
    if isinstance(step, LinearStep):
        matrix = weight.flatten(1)
        return lambda image: torch.nn.functional.linear(image.flatten(1), matrix)[:, :, None, None]
    window = (step.stride, step.padding, step.dilation, step.groups)
    return lambda image: torch.nn.functional.conv2d(image, weight, None, *window)


def bind(
    step: ConvStep | LinearStep,
    problem: Problem,
    config: HalfConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: HalfWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """Three launches of one step, its buffers fixed: decode, multiply in torch, finish."""
    source = program.tensors[step.input]
    target, meta = bind_emit(step.emit, program, arrays, buffers)
    size = (problem.batch, problem.height, problem.width, problem.in_channels)
    pixels = problem.batch * problem.height * problem.width
    rows = problem.rows
    codes = buffers[step.input]
    values = torch.empty(size, dtype=torch.float16, device=codes.device)
    image = values.permute(0, 3, 1, 2)
    tile = elementwise_default(replace(problem, in_channels=problem.out_channels))
    multiply = product(step, weights.weight)
    filters = problem.out_channels
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(filters, tile.block_c),)
    decode_grid = (triton.cdiv(pixels, 32) * triton.cdiv(problem.in_channels, 32),)
    facts = {"BITS": source.bits, "ZERO": source.zero, "SIGNED": source.signed, "BLOCK_M": 32}

    def launch(inputs: list[Tensor]) -> None:
        decode_kernel[decode_grid](codes, values, pixels, problem.in_channels, pixel_elements(source), **facts)
        acc = multiply(image).contiguous(memory_format=torch.channels_last)
        finish_kernel[grid](
            acc, arrays[step.multiplier], arrays[step.bias], target, rows, filters, 2.0**weights.shift,
            EMIT=meta, CONFIG=tile, num_warps=tile.warps, **LAUNCH_OPTIONS,
        )  # fmt: skip

    return launch
