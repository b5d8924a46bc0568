"""K1 and K3 on the device: implicit GEMM on INT8 tensor cores, operands unpacked in registers, the epilogue fused.

Operands. The tensor cores multiply int8 by int8. With w and x what they are given,

    w_true   = w_scale * w + w_shift     w_true = 2 qw - n on the odd grid, qw - 2^(bits - 1) on the one with a zero;
                                         w = w_true, but on the odd grid at 8 bits w = qw - 128, scale 2, shift 1
    x_true   = x_scale * x + x_shift     x_true = qx - zero, or 2 qx - n if signed, so scale 1 or 2;
                                         x = qx below 8 bits; x = qx - 128 at 8 bits

    acc = sum w_true x_true = DOT_SCALE * sum w x + SUM_SCALE * sum x + offset[o]
    offset[o] = w_scale * x_shift * sum_k w[o] + w_shift * x_shift * K

Padding is the code `zero` (x_true = 0), read from a pixel of its own, so sums over k always run over all K. `sum x` is
needed for 8-bit weights on the odd grid only. Fields (gpu/weights.py) give w * 2^DOT_SHIFT, and the sum is shifted
back, exactly, which takes room in the accumulator (configs/gemm.py). All else is exact modulo 2^32, and the guard
K n_w n_x < 2^31 holds.

Split-K. Programs that share a tile add their sums to one workspace; integers add in any order. The last of them to
arrive, counted by an atomic, takes the total, leaves zeros behind for the next launch, and emits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.triton.common import begin_step, fma
from lbs_kernels.gpu.triton.emit import emit
from lbs_kernels.gpu.triton.unpack import (
    add_bytes,
    field_registers,
    load_words,
    plane_registers,
    quarter_sums,
    split_bytes,
)


class GemmMeta(NamedTuple):
    """What the compiler knows of the operands; everything here selects code."""

    kernel: tuple[int, int]
    w_bits: int
    odd: bool  # the grid of the weights
    a_bits: int
    dot_shift: int
    dot_scale: int
    sum_scale: int
    padded: bool  # windows reach beyond the image
    tail: bool  # the last word block reaches beyond the input channels
    run: int  # words that are contiguous and aligned at the start of every block of a plane


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


class GemmOperands(NamedTuple):
    """Pointers of one step."""

    x: Tensor  # planes int32 [N, H, W, a_bits, CW], or biased bytes int8 [N, H, W, pitch]
    padding: Tensor  # two such pixels: of code `zero`, and of x = 0
    w: Tensor  # int8 or int32 tiles of gpu/weights.py
    offset: Tensor  # int32 [O]
    multiplier: Tensor  # float32 [O]
    bias: Tensor  # float32 [O]


class SplitTarget(NamedTuple):
    """Where programs that share a tile meet; both hold zeros between launches."""

    partial: Tensor  # int32 [tiles, BLOCK_M * BLOCK_O]
    arrived: Tensor  # int32 [tiles]


@triton.jit
def load_weights(w_ptr, step, rows, first, META: tl.constexpr, CONFIG: tl.constexpr):
    """w int8 [BLOCK_O, 32 STEP_WORDS] of one step, filters from `first` on; padded rows of the tile are there."""
    BLOCK_O: tl.constexpr = CONFIG.block_o
    STEP_WORDS: tl.constexpr = CONFIG.block_words * CONFIG.block_taps
    BLOCK_K: tl.constexpr = 32 * STEP_WORDS
    row = (step * rows + first) + tl.arange(0, BLOCK_O)
    if CONFIG.weights == "bytes":
        w = tl.load(w_ptr + row[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])
    else:
        FIELD: tl.constexpr = 2 if META.w_bits <= 2 else 4
        SIZE: tl.constexpr = STEP_WORDS * FIELD
        words = tl.load(w_ptr + row[:, None] * SIZE + tl.arange(0, SIZE)[None, :])
        FULL: tl.constexpr = 32 * CONFIG.warps <= BLOCK_O * SIZE
        w = split_bytes(field_registers(words, META.w_bits, META.odd), BLOCK_O, BLOCK_K, FULL)
    return w


@triton.jit
def load_activations(pixel, first_word, words, x_sum, shape, META: tl.constexpr, CONFIG: tl.constexpr):
    """x int8 [BLOCK_M, 32 STEP_WORDS], and x_sum with the sums over each row if asked for.

    pixel: pointers [BLOCK_M, 1], or one for each element of a row if a step has several taps.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    STEP_WORDS: tl.constexpr = CONFIG.block_words * CONFIG.block_taps
    BLOCK_K: tl.constexpr = 32 * STEP_WORDS
    if META.a_bits == 8:
        channel = first_word * 32 + within_tap(BLOCK_K, CONFIG)
        pointer = in_runs(pixel + channel[None, :], 16, CONFIG)
        x = load_words(pointer, (channel < shape.pitch)[None, :] if META.tail else None)
        if META.sum_scale != 0:
            terms = x
            if META.tail:  # bytes beyond the last channel hold nothing in particular
                terms = tl.where((channel < shape.channels)[None, :], x, 0).to(tl.int8)
            VECTORS: tl.constexpr = 16 * 32 * CONFIG.warps <= BLOCK_M * BLOCK_K
            terms = quarter_sums(terms, VECTORS)
            x_sum += tl.sum(tl.reshape(terms, [BLOCK_M, BLOCK_K // 16, 16]), axis=2)
    else:
        word = first_word + within_tap(STEP_WORDS, CONFIG)
        pointer = in_runs(pixel + word[None, :], META.run, CONFIG)
        mask = (word < words)[None, :] if META.tail else None
        registers = plane_registers(pointer, words, mask, META.a_bits)
        if META.sum_scale != 0:
            x_sum = add_bytes(registers, x_sum)
        FULL: tl.constexpr = 32 * CONFIG.warps <= BLOCK_M * STEP_WORDS
        x = split_bytes(registers, BLOCK_M, BLOCK_K, FULL)
    return x, x_sum


@triton.jit
def within_tap(SIZE: tl.constexpr, CONFIG: tl.constexpr):
    """Place within its tap of each of the SIZE elements of a row."""
    place = tl.arange(0, SIZE)
    if CONFIG.block_taps > 1:
        place = place % (SIZE // CONFIG.block_taps)
    return place


@triton.jit
def several_taps(operands, step, start, first_y, first_x, pitch, shape, META: tl.constexpr, CONFIG: tl.constexpr):
    """Pointers [BLOCK_M, elements of a row] to the pixels of a step's taps; x = 0 behind the last tap."""
    KERNEL_W: tl.constexpr = META.kernel[1]
    TAPS: tl.constexpr = META.kernel[0] * KERNEL_W
    PER_TAP: tl.constexpr = CONFIG.block_words * (32 if META.a_bits == 8 else 1)
    tap = step * CONFIG.block_taps + tl.arange(0, CONFIG.block_taps * PER_TAP) // PER_TAP
    shift_y = tap // KERNEL_W * shape.dilation_h
    shift_x = tap % KERNEL_W * shape.dilation_w
    pixel = operands.x + (start[:, None] + ((shift_y * shape.width + shift_x) * pitch)[None, :])
    if META.padded:
        in_y = (first_y[:, None] + shift_y[None, :]).to(tl.uint32, bitcast=True) < tl.cast(shape.height, tl.uint32)
        in_x = (first_x[:, None] + shift_x[None, :]).to(tl.uint32, bitcast=True) < tl.cast(shape.width, tl.uint32)
        pixel = tl.where(in_y & in_x, pixel, operands.padding)
    if TAPS % CONFIG.block_taps != 0:
        pixel = tl.where((tap < TAPS)[None, :], pixel, operands.padding + pitch)
    return pixel


@triton.jit
def in_runs(pointer, RUN: tl.constexpr, CONFIG: tl.constexpr):
    """Pointers of a row are contiguous and aligned in runs, which the compiler sees itself where a step is one tap."""
    return pointer if CONFIG.block_taps == 1 else tl.max_contiguous(tl.multiple_of(pointer, [1, RUN]), [1, RUN])


@triton.jit
def empty_sums(META: tl.constexpr, CONFIG: tl.constexpr):
    """Accumulators of sum x, in the shape in which a thread adds without asking others."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    STEP_WORDS: tl.constexpr = CONFIG.block_words * CONFIG.block_taps
    if META.sum_scale == 0:
        sums = tl.zeros([1], dtype=tl.int32)
    elif META.a_bits == 8:
        sums = tl.zeros([BLOCK_M, 2 * STEP_WORDS], dtype=tl.int32)
    else:
        sums = tl.zeros([BLOCK_M, STEP_WORDS, 2, 2, 2], dtype=tl.int32)
    return sums


@triton.jit
def accumulate(operands, row, first, rows, part, shape, META: tl.constexpr, CONFIG: tl.constexpr):
    """The accumulator int32 [BLOCK_M, BLOCK_O] without its offset; `part` of CONFIG.split_k of the reduction."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_O: tl.constexpr = CONFIG.block_o
    BLOCK_WORDS: tl.constexpr = CONFIG.block_words
    KERNEL_W: tl.constexpr = META.kernel[1]
    TAPS: tl.constexpr = META.kernel[0] * KERNEL_W
    RUN: tl.constexpr = META.run
    # One channel is a constant to the compiler, which takes no hint about constants; a run of 1 needs none.
    words = (shape.channels + 31) // 32
    if RUN > 1:
        words = tl.multiple_of(words, RUN)
    pitch = tl.multiple_of(shape.pitch, 16) if META.a_bits == 8 else words * META.a_bits
    if META.a_bits < 8 and RUN > 1:
        pitch = tl.multiple_of(pitch, RUN)
    # Rows beyond the last repeat it: what they give is never stored, and no load needs a mask for them.
    row = tl.minimum(row, shape.rows - 1)
    pixels = shape.out_height * shape.out_width
    first_y = (row % pixels) // shape.out_width * shape.stride_h - shape.pad_h
    first_x = row % shape.out_width * shape.stride_w - shape.pad_w
    start = ((row // pixels * shape.height + first_y) * shape.width + first_x) * pitch
    if CONFIG.weights_first:
        acc = tl.zeros([BLOCK_O, BLOCK_M], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.int32)
    x_sum = empty_sums(META, CONFIG)
    GROUPS: tl.constexpr = (TAPS + CONFIG.block_taps - 1) // CONFIG.block_taps
    steps = (words + BLOCK_WORDS - 1) // BLOCK_WORDS * GROUPS
    per_part = (steps + CONFIG.split_k - 1) // CONFIG.split_k
    first_step = part * per_part
    first_word = first_step // GROUPS * BLOCK_WORDS  # always 0 where a step has several taps
    tap_y = first_step % TAPS // KERNEL_W
    tap_x = first_step % KERNEL_W  # TAPS is a multiple of it
    # One flat loop over word blocks and taps: the compiler pipelines innermost loops only, and those would be short. It
    # counts like an odometer, where divisions took a sixth of the loop.
    for step in range(first_step, tl.minimum(steps, first_step + per_part)):
        if CONFIG.block_taps > 1:
            pixel = several_taps(operands, step, start, first_y, first_x, pitch, shape, META, CONFIG)
        else:
            shift_y = tap_y * shape.dilation_h
            shift_x = tap_x * shape.dilation_w
            pixel = operands.x + (start + (shift_y * shape.width + shift_x) * pitch)
            if META.padded:
                # As unsigned numbers, rows above the image lie beyond its height.
                in_y = (first_y + shift_y).to(tl.uint32, bitcast=True) < tl.cast(shape.height, tl.uint32)
                in_x = (first_x + shift_x).to(tl.uint32, bitcast=True) < tl.cast(shape.width, tl.uint32)
                pixel = tl.where(in_y & in_x, pixel, operands.padding)
            pixel = pixel[:, None]
        x, x_sum = load_activations(pixel, first_word, words, x_sum, shape, META, CONFIG)
        w = load_weights(operands.w, step, rows, first, META, CONFIG)
        if CONFIG.block_taps == 1:
            if TAPS == 1:
                first_word += BLOCK_WORDS
            else:
                end_x = tap_x == KERNEL_W - 1
                end_y = end_x & (tap_y == META.kernel[0] - 1)
                first_word += tl.where(end_y, BLOCK_WORDS, 0)
                tap_y = tl.where(end_y, 0, tap_y + end_x.to(tl.int32))
                tap_x = tl.where(end_x, 0, tap_x + 1)
        if CONFIG.weights_first:
            acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    if CONFIG.weights_first:
        acc = tl.trans(acc)
    acc = (acc >> META.dot_shift) * META.dot_scale
    if META.sum_scale != 0:
        acc += tl.sum(tl.reshape(x_sum, [BLOCK_M, x_sum.numel // BLOCK_M]), axis=1)[:, None] * META.sum_scale
    return acc


@triton.jit
def tile(shape, CONFIG: tl.constexpr):
    """Pixels [BLOCK_M] and first filter of this program; neighbours share pixels, which then stay in the L2 cache."""
    filter_blocks = (shape.filters + CONFIG.block_o - 1) // CONFIG.block_o
    program = tl.program_id(0)
    row = (program // filter_blocks) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    return row, (program % filter_blocks) * CONFIG.block_o


@triton.jit
def finish(acc, operands, row, first, target, shape, EMIT: tl.constexpr, CONFIG: tl.constexpr):
    """acc + offset, y = fma(float32(acc), multiplier, bias), emit."""
    column = first + tl.arange(0, CONFIG.block_o)
    mask = column < shape.filters
    acc += tl.load(operands.offset + column, mask=mask, other=0)[None, :]
    multiplier = tl.load(operands.multiplier + column, mask=mask, other=0.0)
    bias = tl.load(operands.bias + column, mask=mask, other=0.0)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    emit(y, row, row < shape.rows, first, shape.filters, target, EMIT)


@triton.jit
def gemm_kernel(operands, split, target, shape, META: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr):
    """One tile of a convolution or matrix product, or one part of its reduction."""
    begin_step()
    row, first = tile(shape, CONFIG)
    rows = (shape.filters + CONFIG.block_o - 1) // CONFIG.block_o * CONFIG.block_o
    acc = accumulate(operands, row, first, rows, tl.program_id(1), shape, META, CONFIG)
    if CONFIG.split_k == 1:
        finish(acc, operands, row, first, target, shape, EMIT, CONFIG)
    else:
        place = tl.arange(0, CONFIG.block_m)[:, None] * CONFIG.block_o + tl.arange(0, CONFIG.block_o)[None, :]
        place += tl.program_id(0) * (CONFIG.block_m * CONFIG.block_o)
        tl.atomic_add(split.partial + place, acc, sem="relaxed")
        # Every thread's additions, then the count: the barrier orders them within the program, the atomic beyond it.
        tl.debug_barrier()
        before = tl.atomic_add(split.arrived + tl.program_id(0), 1, sem="acq_rel")
        if before == CONFIG.split_k - 1:
            total = tl.load(split.partial + place, cache_modifier=".cg")
            tl.debug_barrier()  # no thread may clear what another has yet to read
            tl.store(split.partial + place, tl.zeros_like(total))
            tl.store(split.arrived + tl.program_id(0), 0)
            finish(total, operands, row, first, target, shape, EMIT, CONFIG)
