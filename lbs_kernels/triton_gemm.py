"""K1: implicit GEMM on INT8 tensor cores, with weights unpacked from bit-planes in registers and the epilogue fused.

Operands. The tensor cores multiply int8 by int8, so centred weights and activations are written as

    2 qw - n = w_scale * w + w_shift        w = 2 qw - n below 8 bits;  w = qw - 128, scale 2, shift 1 at 8 bits
    x_true   = x_scale * x + x_shift        x_true = qx - zero, or 2 qx - n if signed; x = x_true below 8 bits;
                                            x = qx - 128 at 8 bits, so scale 1, shift 128 - zero, or 2 and 1 if signed

    acc = sum (2 qw - n) x_true = DOT_SCALE * sum w x + SUM_SCALE * sum x + offset[o]
    offset[o] = w_scale * x_shift * sum_k w[o] + w_shift * x_shift * K

where padding is the x of code `zero` (x_true = 0), so that sums over k always run over all K. `sum x` is needed for
8-bit weights only. Every term is exact modulo 2^32 and the guard K n_w n_x < 2^31 makes the total fit.
Interpreter-tested and compiled ahead of time; not timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.format import check_accumulator, unpack_weights
from lbs_kernels.gemm_config import GemmConfig
from lbs_kernels.gpu_layout import from_logical, pixel_elements
from lbs_kernels.problem import Problem
from lbs_kernels.program import TensorSpec
from lbs_kernels.triton_common import LAUNCH_OPTIONS, Launch, device_guard, fma, unpack_planes
from lbs_kernels.triton_emit import EmitMeta, EmitTarget, emit


class GemmMeta(NamedTuple):
    """What the compiler knows of the operands; everything here selects code."""

    kernel: tuple[int, int]
    w_bits: int
    a_bits: int
    zero: int
    signed: bool
    dot_scale: int
    sum_scale: int
    tail: bool  # the last word block reaches beyond the input channels


class GemmShape(NamedTuple):
    """Sizes read at run time. `pitch` is the distance of two pixels of x in its elements."""

    rows: int  # N * OH * OW
    filters: int
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
    dilation_h: int
    dilation_w: int
    groups: int


@triton.jit
def load_weights(w_ptr, filter_index, tap, first_word, shape, META: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """w int8 [BLOCK_O, 32 BLOCK_WORDS] of one tap: filters `filter_index`, channels from word `first_word` on."""
    TAPS: tl.constexpr = META.kernel[0] * META.kernel[1]
    BITS: tl.constexpr = META.w_bits
    LEVELS: tl.constexpr = (1 << BITS) - 1
    word = first_word + tl.arange(0, BLOCK_WORDS)
    words = (shape.channels + 31) // 32
    pointer = w_ptr + (filter_index[:, None] * TAPS + tap) * words + word[None, :]
    mask = (filter_index < shape.filters)[:, None] & (word < words)[None, :]
    codes = unpack_planes(pointer, shape.filters * TAPS * words, mask, BITS)
    w = codes - 128 if BITS == 8 else 2 * codes - LEVELS
    if META.tail:
        # x holds nothing in particular beyond the last channel; a weight of 0 makes it harmless.
        channel = first_word * 32 + tl.arange(0, 32 * BLOCK_WORDS)
        w = tl.where((channel < shape.channels)[None, :], w, 0)
    return w.to(tl.int8)


@triton.jit
def load_activations(
    x_ptr, image_row, in_y, in_x, inside, first_word, shape, META: tl.constexpr, BLOCK_WORDS: tl.constexpr
):
    """x int8 [BLOCK_M, 32 BLOCK_WORDS] of one tap: pixels (in_y, in_x), the value of code `zero` where not inside."""
    BITS: tl.constexpr = META.a_bits
    LEVELS: tl.constexpr = (1 << BITS) - 1
    pixel = (image_row + in_y) * shape.width + in_x
    if BITS == 8:
        channel = first_word * 32 + tl.arange(0, 32 * BLOCK_WORDS)
        # The pitch is a multiple of 16 and so is every run of valid elements: the mask does not break up the loads.
        mask = inside[:, None] & (channel < shape.pitch)[None, :]
        x = tl.load(x_ptr + pixel[:, None] * shape.pitch + channel[None, :], mask=mask, other=META.zero - 128)
    else:
        word = first_word + tl.arange(0, BLOCK_WORDS)
        words = (shape.channels + 31) // 32
        pointer = x_ptr + pixel[:, None] * shape.pitch + word[None, :]
        codes = unpack_planes(pointer, words, inside[:, None] & (word < words)[None, :], BITS)
        if META.signed:
            codes = 2 * codes - LEVELS
        elif META.zero != 0:
            codes = tl.where(inside[:, None], codes - META.zero, 0)
        x = codes.to(tl.int8)
    return x


@triton.jit
def accumulate(x_ptr, w_ptr, offset_ptr, row, row_mask, column, shape, META: tl.constexpr, CONFIG: tl.constexpr):
    """The accumulator int32 [BLOCK_M, BLOCK_O] of pixels `row` and filters `column`."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_O: tl.constexpr = CONFIG.block_o
    BLOCK_WORDS: tl.constexpr = CONFIG.block_words
    BLOCK_K: tl.constexpr = 32 * BLOCK_WORDS
    pixels = shape.out_height * shape.out_width
    image = row // pixels
    out_y = (row % pixels) // shape.out_width
    out_x = row % shape.out_width
    image_row = image * shape.height
    first_y = out_y * shape.stride_h - shape.pad_h
    first_x = out_x * shape.stride_w - shape.pad_w
    word_blocks = (shape.channels + BLOCK_K - 1) // BLOCK_K
    if CONFIG.weights_first:
        acc = tl.zeros([BLOCK_O, BLOCK_M], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.int32)
    x_sum = tl.zeros([BLOCK_M], dtype=tl.int32)
    # One flat loop over taps and word blocks: the compiler pipelines innermost loops only, and those would be short.
    for step in range(0, META.kernel[0] * META.kernel[1] * word_blocks):
        tap = step // word_blocks
        first_word = (step % word_blocks) * BLOCK_WORDS
        in_y = first_y + (tap // META.kernel[1]) * shape.dilation_h
        in_x = first_x + (tap % META.kernel[1]) * shape.dilation_w
        inside = row_mask & (in_y >= 0) & (in_y < shape.height) & (in_x >= 0) & (in_x < shape.width)
        x = load_activations(x_ptr, image_row, in_y, in_x, inside, first_word, shape, META, BLOCK_WORDS)
        w = load_weights(w_ptr, column, tap, first_word, shape, META, BLOCK_WORDS)
        if META.sum_scale != 0:
            terms = x.to(tl.int32)
            if META.tail:
                channel = first_word * 32 + tl.arange(0, BLOCK_K)
                terms = tl.where((channel < shape.channels)[None, :], terms, 0)
            x_sum += tl.sum(terms, axis=1)
        if CONFIG.weights_first:
            acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    if CONFIG.weights_first:
        acc = tl.trans(acc)
    offset = tl.load(offset_ptr + column, mask=column < shape.filters, other=0)
    acc = acc * META.dot_scale + offset[None, :]
    if META.sum_scale != 0:
        acc += (x_sum * META.sum_scale)[:, None]
    return acc


@triton.jit
def tile(shape, CONFIG: tl.constexpr):
    """Pixels [BLOCK_M] and first filter of this program; neighbours share pixels, which then stay in the L2 cache."""
    filter_blocks = (shape.filters + CONFIG.block_o - 1) // CONFIG.block_o
    program = tl.program_id(0)
    row = (program // filter_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    return row, (program % filter_blocks) * CONFIG.block_o


@triton.jit
def gemm_kernel(
    x_ptr,  # planes int32 [N, H, W, a_bits, CW], or biased bytes int8 [N, H, W, pitch]
    w_ptr,  # int32 [w_bits, O, T, CW]
    offset_ptr,  # int32 [O]
    multiplier_ptr,  # float32 [O]
    bias_ptr,  # float32 [O]
    target,
    shape,
    META: tl.constexpr,
    EMIT: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """One tile of a convolution or matrix product: accumulate, y = fma(float32(acc), multiplier, bias), emit."""
    row, first = tile(shape, CONFIG)
    row_mask = row < shape.rows
    column = first + tl.arange(0, CONFIG.block_o)
    acc = accumulate(x_ptr, w_ptr, offset_ptr, row, row_mask, column, shape, META, CONFIG)
    column_mask = column < shape.filters
    multiplier = tl.load(multiplier_ptr + column, mask=column_mask, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    emit(y, row, row_mask, first, shape.filters, target, EMIT)


@triton.jit
def accumulator_kernel(x_ptr, w_ptr, offset_ptr, acc_ptr, shape, META: tl.constexpr, CONFIG: tl.constexpr):
    """The accumulator alone, int32 [M, O]: exact where float32 would round it, for tests."""
    row, first = tile(shape, CONFIG)
    row_mask = row < shape.rows
    column = first + tl.arange(0, CONFIG.block_o)
    acc = accumulate(x_ptr, w_ptr, offset_ptr, row, row_mask, column, shape, META, CONFIG)
    mask = row_mask[:, None] & (column < shape.filters)[None, :]
    tl.store(acc_ptr + row[:, None] * shape.filters + column[None, :], acc, mask=mask)


@dataclass(frozen=True)
class GemmWeights:
    """Weights of one step on the device, and what they add to every accumulator."""

    planes: Tensor  # int32 [w_bits, O, T, CW]
    offset: Tensor  # int32 [O]
    meta: GemmMeta  # `tail` depends on the configuration and is set at launch


def prepare_weights(
    planes: Tensor, kernel: tuple[int, int], groups: int, source: TensorSpec, device: torch.device
) -> GemmWeights:
    """Weights for the activations of `source`; sums over k are taken once, here.

    Args:
        planes: int32 [w_bits, O, T, CW], T = kernel taps, CW over the channels of one group.
        kernel: (rows, columns).
        groups: of the convolution.
        source: channels, bits, zero and sign of the activations.
        device: where the kernels run.

    Raises:
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
    """
    w_bits, _, taps, _ = planes.shape
    channels = source.channels // groups
    check_accumulator(taps * channels, w_bits, source.bits, source.name)
    levels = (1 << w_bits) - 1
    w_scale, w_shift = (2, 1) if w_bits == 8 else (1, 0)
    if source.bits == 8:
        x_scale, x_shift = (2, 1) if source.signed else (1, 128 - source.zero)
    else:
        x_scale, x_shift = 1, 0
    codes = unpack_weights(planes.cpu(), channels).long()
    w_sum = (codes - 128 if w_bits == 8 else 2 * codes - levels).sum(dim=(1, 2))
    # int64 here, int32 on the device: only the sum with the dot product has to fit, the rest wraps around.
    offset = w_scale * x_shift * w_sum + w_shift * x_shift * taps * channels
    meta = GemmMeta(
        kernel, w_bits, source.bits, source.zero, source.signed, w_scale * x_scale, w_shift * x_scale, tail=False
    )
    return GemmWeights(planes.contiguous().to(device), offset.to(torch.int32).to(device), meta)


def gemm_shape(problem: Problem, source: TensorSpec) -> GemmShape:
    """The sizes the kernel reads, of a convolution, or of a matrix product as one of 1 x 1 pixels."""
    return GemmShape(
        problem.batch * problem.out_height * problem.out_width,
        problem.out_channels,
        problem.in_channels,
        pixel_elements(source),
        problem.height,
        problem.width,
        problem.out_height,
        problem.out_width,
        *problem.stride,
        *problem.padding,
        *problem.dilation,
        problem.groups,
    )


def gemm_reason(problem: Problem) -> str | None:
    """Why the kernels cannot serve `problem`, or None."""
    if not 1 <= problem.w_bits <= 8 or not 1 <= problem.a_bits <= 8:
        return f"w{problem.w_bits}a{problem.a_bits}; codes have 1 to 8 bits"
    return None


def launch_options(config: GemmConfig) -> dict[str, int | bool]:
    """Options of a launch, and of an ahead-of-time compilation of the same kernel."""
    return {**LAUNCH_OPTIONS, "num_warps": config.warps, "num_stages": config.stages}


def gemm_meta(weights: GemmWeights, channels: int, config: GemmConfig) -> GemmMeta:
    """The facts of the operands, complete for one configuration."""
    return weights.meta._replace(tail=channels % (32 * config.block_words) != 0)


def gemm_grid(shape: GemmShape, config: GemmConfig) -> tuple[int]:
    """Programs of one launch."""
    return (triton.cdiv(shape.rows, config.block_m) * triton.cdiv(shape.filters, config.block_o),)


def bind_gemm(
    x: Tensor,
    weights: GemmWeights,
    multiplier: Tensor,
    bias: Tensor,
    target: EmitTarget,
    emit_meta: EmitMeta,
    shape: GemmShape,
    config: GemmConfig,
) -> Launch:
    """A launch of `gemm_kernel` on activations x in their GPU form, everything fixed."""
    run = functools.partial(
        gemm_kernel[gemm_grid(shape, config)], x, weights.planes, weights.offset, multiplier, bias, target, shape,
        META=gemm_meta(weights, shape.channels, config), EMIT=emit_meta, CONFIG=config, **launch_options(config),
    )  # fmt: skip
    return lambda inputs: run()


def gemm_accumulate(
    x_codes: Tensor, w_planes: Tensor, source: TensorSpec, problem: Problem, config: GemmConfig
) -> Tensor:
    """Accumulator int32 [N, OH, OW, O] of codes uint8 [N, H, W, C] and planes int32 [w_bits, O, T, CW], one group."""
    weights = prepare_weights(w_planes, problem.kernel, 1, source, x_codes.device)
    x = from_logical(x_codes, source)
    shape = gemm_shape(problem, source)
    size = (problem.batch, problem.out_height, problem.out_width, problem.out_channels)
    acc = torch.empty(size, dtype=torch.int32, device=x.device)
    if acc.numel():
        with device_guard(x.device):
            accumulator_kernel[gemm_grid(shape, config)](
                x, weights.planes, weights.offset, acc, shape,
                META=gemm_meta(weights, shape.channels, config), CONFIG=config, **launch_options(config),
            )  # fmt: skip
    return acc
