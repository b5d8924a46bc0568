"""K4: depthwise convolution. Bytes of four taps meet in one register, and one instruction sums their four products.

Nothing is shared between channels, so there is nothing for a tensor core. A thread reads whole words of channels, which
come out as registers of 4 channels (gpu/triton/unpack.py). Four taps of those are transposed, 8 byte permutes for 16
products, and `dp4a` multiplies four taps of one channel with their weights.

    acc[c] = DOT_SCALE * sum over taps of w x + SUM_SCALE * sum over taps of x + offset[c]

with w, x and the offset of gpu/triton/gemm_kernel.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.gpu.configs.direct import DepthwiseConfig
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.layout import BYTE_BITS
from lbs_kernels.gpu.triton.common import INTERPRETED, begin_step, fma
from lbs_kernels.gpu.triton.emit import EmitMeta, EmitTarget, emit
from lbs_kernels.gpu.triton.gemm import GemmWeights, launch_options, operand_scales
from lbs_kernels.gpu.triton.gemm_kernel import GemmMeta, GemmOperands, GemmShape
from lbs_kernels.gpu.triton.unpack import load_words, plane_registers
from lbs_kernels.gpu.weights import centre_bytes, channel_order, uncentre_bytes
from lbs_kernels.program.planes import WORD, words

TAPS_PER_REGISTER = 4


@dataclass(frozen=True)
class TapRegisters:
    """One layout: codes uint8 [C, T] <-> int32 [ceil(T / 4), 4, 8 CW]; `codes` is the exact inverse of `registers`.

    Register r of row i holds taps 4 g .. 4 g + 3 of the channel whose activations are byte i of register r of a pixel.
    """

    bits: int
    a_bits: int
    grid: str = "odd"

    def registers(self, codes: Tensor) -> Tensor:
        """int32 [ceil(T / 4), 4, 8 CW]; taps and channels beyond the last weigh 0."""
        channels, taps = codes.shape
        groups, size = -(-taps // TAPS_PER_REGISTER), words(channels) * WORD
        byte = torch.zeros(size, groups * TAPS_PER_REGISTER, dtype=torch.uint8)
        byte[:channels, :taps] = centre_bytes(codes, self.bits, self.grid)
        byte = byte.reshape(-1, WORD, groups, TAPS_PER_REGISTER)[:, channel_order(self.a_bits)]
        byte = byte.reshape(-1, 4, groups, TAPS_PER_REGISTER).permute(2, 1, 0, 3)
        return byte.contiguous().view(torch.int32).squeeze(-1)

    def codes(self, registers: Tensor, channels: int, taps: int) -> Tensor:
        """uint8 [C, T], the inverse of `registers`.

        Raises:
            FormatError: registers of another size.
        """
        groups = -(-taps // TAPS_PER_REGISTER)
        if tuple(registers.shape) != (groups, 4, 8 * words(channels)):
            raise FormatError(
                f"registers have shape {tuple(registers.shape)}; {channels} channels of {taps} taps need "
                f"{(groups, 4, 8 * words(channels))}"
            )
        byte = registers.contiguous().view(torch.uint8).reshape(groups, 4, -1, TAPS_PER_REGISTER)
        byte = byte.permute(2, 1, 0, 3).reshape(-1, WORD, groups, TAPS_PER_REGISTER)
        byte = byte[:, channel_order(self.a_bits).argsort()].reshape(-1, groups * TAPS_PER_REGISTER)
        return uncentre_bytes(byte[:channels, :taps], self.bits, self.grid)


@triton.jit
def permute_bytes(a, b, SELECTOR: tl.constexpr):
    """Byte k of the result is byte (SELECTOR >> 4 k) & 7 of a (0 to 3) and b (4 to 7)."""
    if INTERPRETED:
        result = a * 0
        for k in tl.static_range(4):
            source = a if ((SELECTOR >> (4 * k)) & 7) < 4 else b
            result |= ((source >> (8 * ((SELECTOR >> (4 * k)) & 3))) & 255) << (8 * k)
    else:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, SELECTOR], dtype=tl.int32, is_pure=True, pack=1
        )
    return result


@triton.jit
def dot_bytes(a, b, total):
    """total + the sum of the products of the 4 signed bytes of a and b."""
    if INTERPRETED:
        for k in tl.static_range(4):
            total += ((a << (24 - 8 * k)) >> 24) * ((b << (24 - 8 * k)) >> 24)
        result = total
    else:
        result = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    return result


@triton.jit
def tap_registers(operands, row, first_word, tap: tl.constexpr, shape, META: tl.constexpr, CONFIG: tl.constexpr):
    """Activations of one tap as registers of 4 channels, int32 [BLOCK_M, BLOCK_C / 4]; row is in range."""
    BLOCK_WORDS: tl.constexpr = CONFIG.block_c // 32
    REGISTERS: tl.constexpr = 8 * BLOCK_WORDS
    RUN: tl.constexpr = META.run
    BLOCK_M: tl.constexpr = CONFIG.block_m
    words = tl.multiple_of((shape.channels + 31) // 32, RUN)
    pixels = shape.out_height * shape.out_width
    in_y = (row % pixels) // shape.out_width * shape.stride_h - shape.pad_h + tap // META.kernel[1] * shape.dilation_h
    in_x = row % shape.out_width * shape.stride_w - shape.pad_w + tap % META.kernel[1] * shape.dilation_w
    pitch = tl.multiple_of(shape.pitch // 4, 4) if META.a_bits == 8 else tl.multiple_of(words * META.a_bits, RUN)
    pixel = operands.x + ((row // pixels * shape.height + in_y) * shape.width + in_x) * pitch
    if META.padded:
        inside = (in_y >= 0) & (in_y < shape.height) & (in_x >= 0) & (in_x < shape.width)
        pixel = tl.where(inside, pixel, operands.padding)
    if META.a_bits == 8:
        register = first_word * 8 + tl.arange(0, REGISTERS)
        pointer = pixel[:, None] + register[None, :]
        x = load_words(pointer, (register < pitch)[None, :] if META.tail else None)
    else:
        word = first_word + tl.arange(0, BLOCK_WORDS)
        mask = (word < words)[None, :] if META.tail else None
        x = plane_registers(pixel[:, None] + word[None, :], words, mask, META.a_bits)
        x = tl.reshape(x, [BLOCK_M, REGISTERS])
    return x


@triton.jit
def natural_order(s0, s1, s2, s3, A_BITS: tl.constexpr, CONFIG: tl.constexpr):
    """[BLOCK_M, BLOCK_C] in the order of channels; s_i [BLOCK_M, BLOCK_C / 4] belongs to byte i of each register."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    sums = tl.join(tl.join(s0, s2), tl.join(s1, s3))  # [BLOCK_M, registers, 2, 2]
    if A_BITS != 8:
        sums = tl.reshape(sums, [BLOCK_M, BLOCK_C // 32, 8, 4])
        sums = tl.permute(sums, [0, 1, 3, 2])
    return tl.reshape(sums, [BLOCK_M, BLOCK_C])


@triton.jit
def depthwise_kernel(operands, target, shape, META: tl.constexpr, EMIT: tl.constexpr, CONFIG: tl.constexpr):
    """One tile of pixels and channels."""
    begin_step()
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_C: tl.constexpr = CONFIG.block_c
    A_BITS: tl.constexpr = META.a_bits
    REGISTERS: tl.constexpr = BLOCK_C // 4
    TAPS: tl.constexpr = META.kernel[0] * META.kernel[1]
    channel_blocks = (shape.channels + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // channel_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % channel_blocks) * BLOCK_C
    valid = tl.minimum(row, shape.rows - 1)
    registers = (shape.channels + 31) // 32 * 8
    register = first // 4 + tl.arange(0, REGISTERS)
    there = register < registers
    zero = tl.zeros([BLOCK_M, REGISTERS], dtype=tl.int32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    t0, t1, t2, t3 = zero, zero, zero, zero
    for group in tl.static_range((TAPS + 3) // 4):
        a = tap_registers(operands, valid, first // 32, 4 * group, shape, META, CONFIG)
        b, c, d = zero, zero, zero
        if 4 * group + 1 < TAPS:
            b = tap_registers(operands, valid, first // 32, 4 * group + 1, shape, META, CONFIG)
        if 4 * group + 2 < TAPS:
            c = tap_registers(operands, valid, first // 32, 4 * group + 2, shape, META, CONFIG)
        if 4 * group + 3 < TAPS:
            d = tap_registers(operands, valid, first // 32, 4 * group + 3, shape, META, CONFIG)
        ab_low = permute_bytes(a, b, 0x5140)  # a0 b0 a1 b1
        ab_high = permute_bytes(a, b, 0x7362)  # a2 b2 a3 b3
        cd_low = permute_bytes(c, d, 0x5140)
        cd_high = permute_bytes(c, d, 0x7362)
        x0 = permute_bytes(ab_low, cd_low, 0x5410)  # a0 b0 c0 d0
        x1 = permute_bytes(ab_low, cd_low, 0x7632)
        x2 = permute_bytes(ab_high, cd_high, 0x5410)
        x3 = permute_bytes(ab_high, cd_high, 0x7632)
        w = operands.w + group * 4 * registers + register
        s0 = dot_bytes(x0, tl.load(w, mask=there, other=0)[None, :], s0)
        s1 = dot_bytes(x1, tl.load(w + registers, mask=there, other=0)[None, :], s1)
        s2 = dot_bytes(x2, tl.load(w + 2 * registers, mask=there, other=0)[None, :], s2)
        s3 = dot_bytes(x3, tl.load(w + 3 * registers, mask=there, other=0)[None, :], s3)
        if META.sum_scale != 0:
            ones = zero + 0x01010101
            t0, t1 = dot_bytes(x0, ones, t0), dot_bytes(x1, ones, t1)
            t2, t3 = dot_bytes(x2, ones, t2), dot_bytes(x3, ones, t3)
    acc = natural_order(s0, s1, s2, s3, A_BITS, CONFIG) * META.dot_scale
    if META.sum_scale != 0:
        acc += natural_order(t0, t1, t2, t3, A_BITS, CONFIG) * META.sum_scale
    column = first + tl.arange(0, BLOCK_C)
    mask = column < shape.channels
    acc += tl.load(operands.offset + column, mask=mask, other=0)[None, :]
    multiplier = tl.load(operands.multiplier + column, mask=mask, other=0.0)
    bias = tl.load(operands.bias + column, mask=mask, other=0.0)
    y = fma(acc.to(tl.float32), multiplier[None, :], bias[None, :])
    emit(y, row, row < shape.rows, first, shape.channels, target, EMIT)


def bind_depthwise(
    x: Tensor,
    weights: GemmWeights,
    multiplier: Tensor,
    bias: Tensor,
    target: EmitTarget,
    emit_meta: EmitMeta,
    shape: GemmShape,
    config: DepthwiseConfig,
) -> Launch:
    """A launch of `depthwise_kernel` on activations x in their GPU form, everything fixed."""
    a_bits = weights.source.bits
    taps = TapRegisters(weights.bits, a_bits, weights.grid).registers(weights.codes.squeeze(-1)).to(x.device)
    pixel = (x, weights.padding) if a_bits < BYTE_BITS else (x.view(torch.int32), weights.padding.view(torch.int32))
    block_words, count = config.block_c // WORD, words(shape.channels)
    dot_scale, sum_scale = operand_scales(weights)
    meta = GemmMeta(
        weights.kernel, weights.bits, weights.grid == "odd", a_bits, 0, dot_scale, sum_scale,
        padded=shape.pad_h > 0 or shape.pad_w > 0, tail=shape.channels % config.block_c != 0,
        run=min(block_words, count & -count),
    )  # fmt: skip
    grid = (triton.cdiv(shape.rows, config.block_m) * triton.cdiv(shape.channels, config.block_c),)
    run = functools.partial(
        depthwise_kernel[grid], GemmOperands(*pixel, taps, weights.offset, multiplier, bias), target, shape,
        META=meta, EMIT=emit_meta, CONFIG=config, **launch_options(config.warps, 2), launch_pdl=overlaps(),
    )  # fmt: skip
    return lambda inputs: run()
