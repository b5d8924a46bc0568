"""Planes and fields into int8 operands of the tensor core, in registers.

Bits are moved a register at a time, 4 channels in its 4 bytes, in the order of gpu/weights.py. Only then is a register
of 4 bytes split into 4 int8 elements, which costs nothing where inline assembly says so: a tensor that lists each
register 4 times along its last dimensions is declared to be the 4 bytes.

That is true only while one thread holds the 4 together. `tl.join` puts them there, and the compiler keeps the layout
of a load that has work for every thread; a smaller load it may spread again. So a caller says whether every thread
loads something (FULL), else bytes are split by shifts, as in the interpreter, which is right in any layout. The tests
read the layouts of every shipped kernel from the compiler's output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbs_kernels.gpu.triton.common import INTERPRETED

ODD = tl.constexpr(-0x55555556)  # 0xAAAAAAAA
EVEN = tl.constexpr(0x55555555)
HIGH_PAIRS = tl.constexpr(-0x33333334)  # 0xCCCCCCCC
LOW_PAIRS = tl.constexpr(0x33333333)


@triton.jit
def split_bytes(registers, ROWS: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr):
    """int8 [ROWS, SIZE] of int32 registers [ROWS, ..] whose 4 bytes are 4 neighbours, lowest byte first."""
    if INTERPRETED or not FULL:
        low = tl.join(registers.to(tl.int8), (registers >> 16).to(tl.int8))
        high = tl.join((registers >> 8).to(tl.int8), (registers >> 24).to(tl.int8))
        elements = tl.join(low, high)
    else:
        twice = tl.join(registers, registers)
        four = tl.join(twice, twice)
        elements = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [four], dtype=tl.int8, is_pure=True, pack=4
        )
    return tl.reshape(elements, [ROWS, SIZE])


@triton.jit
def add_bytes(registers, total):
    """total + the sum of the 4 signed bytes of each register."""
    if INTERPRETED:
        for i in tl.static_range(4):
            total += (registers << (24 - 8 * i)) >> 24
        result = total
    else:
        result = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, 0x01010101, $2;", "=r,r,r", [registers, total], dtype=tl.int32, is_pure=True, pack=1
        )
    return result


@triton.jit
def quarter_sums(x, FULL: tl.constexpr):
    """int32 terms of int8 x [R, K] with the same sums over any 4 neighbours: the sum of the 4, and three zeros."""
    if INTERPRETED or not FULL:
        terms = x.to(tl.int32)
    else:
        terms = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $4, 0x01010101, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;", "=r,=r,=r,=r,r", [x],
            dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    return terms


@triton.jit
def load_words(pointer, mask):
    """Words, 0 where masked; no mask if it is None."""
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)


@triton.jit
def join8(r0, r1, r2, r3, r4, r5, r6, r7):
    """[.., 2, 2, 2]: the eight in order."""
    even = tl.join(tl.join(r0, r4), tl.join(r2, r6))
    odd = tl.join(tl.join(r1, r5), tl.join(r3, r7))
    return tl.join(even, odd)


@triton.jit
def eight_registers(pointer, stride, mask, BITS: tl.constexpr):
    """Codes of up to 4 bits of words pointed at by [R, W], as [R, W, 2, 2, 2] registers of 4 bytes.

    Two planes become fields of 2 bits, two of those fields of 4, for 32 channels at once; that is half of the work of
    moving every plane into bytes by itself.
    """
    p0 = load_words(pointer, mask)
    if BITS == 1:
        M1: tl.constexpr = 0x01010101
        result = join8(
            p0 & M1, (p0 >> 1) & M1, (p0 >> 2) & M1, (p0 >> 3) & M1,
            (p0 >> 4) & M1, (p0 >> 5) & M1, (p0 >> 6) & M1, (p0 >> 7) & M1,
        )  # fmt: skip
    else:
        p1 = load_words(pointer + stride, mask)
        even = (p0 & EVEN) | ((p1 << 1) & ODD)  # 2-bit fields: channels 0, 2, .. 30
        odd = ((p0 >> 1) & EVEN) | (p1 & ODD)
        if BITS == 2:
            M2: tl.constexpr = 0x03030303
            result = join8(
                even & M2, odd & M2, (even >> 2) & M2, (odd >> 2) & M2,
                (even >> 4) & M2, (odd >> 4) & M2, (even >> 6) & M2, (odd >> 6) & M2,
            )  # fmt: skip
        else:
            M4: tl.constexpr = 0x0F0F0F0F
            p2 = load_words(pointer + 2 * stride, mask)
            high_even = p2 & EVEN
            high_odd = (p2 >> 1) & EVEN
            if BITS == 4:
                p3 = load_words(pointer + 3 * stride, mask)
                high_even = high_even | ((p3 << 1) & ODD)
                high_odd = high_odd | (p3 & ODD)
            c0 = (even & LOW_PAIRS) | ((high_even << 2) & HIGH_PAIRS)  # 4-bit fields: channels 0, 4, .. 28
            c1 = (odd & LOW_PAIRS) | ((high_odd << 2) & HIGH_PAIRS)
            c2 = ((even >> 2) & LOW_PAIRS) | (high_even & HIGH_PAIRS)
            c3 = ((odd >> 2) & LOW_PAIRS) | (high_odd & HIGH_PAIRS)
            result = join8(
                c0 & M4, c1 & M4, c2 & M4, c3 & M4, (c0 >> 4) & M4, (c1 >> 4) & M4, (c2 >> 4) & M4, (c3 >> 4) & M4
            )
    return result


@triton.jit
def plane_registers(pointer, stride, mask, BITS: tl.constexpr):
    """Codes of 1 to 7 bits: registers [R, W, 2, 2, 2], plane p at pointer + p * stride."""
    if BITS <= 4:
        result = eight_registers(pointer, stride, mask, BITS)
    else:
        low = eight_registers(pointer, stride, mask, 4)
        result = low | (eight_registers(pointer + 4 * stride, stride, mask, BITS - 4) << 4)
    return result


@triton.jit
def field_registers(v, BITS: tl.constexpr, HALF: tl.constexpr):
    """Words v [R, V] of fields as [R, V, 8 / field] registers of 4 bytes: code - 2^(BITS - 1) times 2^(8 - BITS).

    HALF adds one half to the code, which makes it 2 q - n times 2^(7 - BITS).
    """
    ONE: tl.constexpr = (0x01010101 << (7 - BITS)) if HALF else 0
    KEEP: tl.constexpr = ((0x01010101 * (256 - (1 << (8 - BITS)))) ^ 0x80000000) - 0x80000000  # as int32
    if BITS <= 2:
        low = tl.join((v & KEEP) | ONE, ((v << 4) & KEEP) | ONE)
        high = tl.join(((v << 2) & KEEP) | ONE, ((v << 6) & KEEP) | ONE)
        result = tl.join(low, high)
    else:
        result = tl.join((v & KEEP) | ONE, ((v << 4) & KEEP) | ONE)
    return result
