"""Exact float steps, streams and bit-planes for the Triton kernels.

Exactness. Every kernel is launched with `LAUNCH_OPTIONS`, which forbids the compiler to contract a multiplication and
an addition into one rounding; where the epilogue asks for a fused multiply-add, `fma` says so. Triton's interpreter
rounds `tl.fma` twice and lets NaN win a maximum, so those have a second form, chosen when this file is imported.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

# Set by TRITON_INTERPRET=1 before Triton is first imported: kernels run in Python, on CPU tensors.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LAUNCH_OPTIONS = {"enable_fp_fusion": False}
WORD = tl.constexpr(32)
# 1.5 * 2^23: adding it to |t| < 2^22 leaves rint(t), half to even, in the low bits of the float.
RINT_MAGIC = tl.constexpr(12582912.0)
RINT_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def begin_step():
    """The first statement of every kernel of a step, which may be launched before the kernels in front of it have ended
    (`gpu/launch.py`): the next one may begin, and this one goes on when they have and what they wrote is visible.
    """
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fma(a, b, c):
    """float32(a * b + c), rounded once."""
    if INTERPRETED:
        # The product is exact in float64; the sum is rounded to odd there, which makes the second rounding harmless.
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        shadow = total - product
        error = (product - (total - shadow)) + (addend - shadow)
        bits = total.to(tl.int64, bitcast=True)
        inexact = (error != 0) & (tl.abs(total) < float("inf")) & (tl.abs(error) < float("inf")) & ((bits & 1) == 0)
        away = tl.where((error > 0) == (total > 0), 1, -1).to(tl.int64)
        result = tl.where(inexact, bits + away, bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def at_least(x, low):
    """IEEE maxNum: a NaN becomes `low`."""
    return tl.where(x >= low, x, low) if INTERPRETED else tl.maximum(x, low)


@triton.jit
def at_most(x, high):
    """IEEE minNum: a NaN becomes `high`."""
    return tl.where(x <= high, x, high) if INTERPRETED else tl.minimum(x, high)


@triton.jit
def load_stream(pointer, mask, DTYPE: tl.constexpr):
    """float32 values of a stream; bfloat16 arrives as int16."""
    value = tl.load(pointer, mask=mask, other=0)
    if DTYPE == "bfloat16":
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def bfloat16_bits(y):
    """y as bfloat16 in the low half of an int32, rounded half to even on the bit pattern: interpreted as on a GPU."""
    bits = y.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Adding could carry a NaN into an infinity: keep the upper half and set the quiet bit instead.
    return tl.where(y == y, rounded, (bits >> 16) | 0x40)


@triton.jit
def as_stream(y, DTYPE: tl.constexpr):
    """float32 y as a stream would store it."""
    if DTYPE == "bfloat16":
        y = (bfloat16_bits(y) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        y = y.to(tl.float16).to(tl.float32)
    return y


@triton.jit
def store_stream(pointer, y, mask, DTYPE: tl.constexpr):
    """Store y in the stream type and return the stored value as float32."""
    if DTYPE == "bfloat16":
        rounded = bfloat16_bits(y)
        tl.store(pointer, rounded.to(tl.int16), mask=mask)
        stored = (rounded << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        half = y.to(tl.float16)
        tl.store(pointer, half, mask=mask)
        stored = half.to(tl.float32)
    else:
        tl.store(pointer, y, mask=mask)
        stored = y
    return stored


@triton.jit
def eight_codes(lanes):
    """Registers [R, words, bytes of a word] of codes below 16 [.., 8]: bit p of code i is bit i of byte p.

    The bits are disjoint, so the sum is an OR.
    """
    spread = (lanes * 0x00204081) & 0x01010101  # bit p of a code to bit 0 of byte p
    return tl.sum(spread << tl.arange(0, lanes.shape[3])[None, None, None, :], axis=3)


@triton.jit
def store_planes(pointer, codes, row, row_mask, first, columns, BITS: tl.constexpr):
    """Planes int32 [M, BITS, CW] of codes int32 [R, BLOCK], all below 2^BITS; channels beyond `columns` become 0 bits.

    `first` is a multiple of BLOCK, and BLOCK a multiple of 32 or at least `columns`: a word is written by one program.
    """
    BLOCK: tl.constexpr = codes.shape[1]
    LANES: tl.constexpr = BLOCK if BLOCK < 8 else 8
    BYTES: tl.constexpr = (BLOCK if BLOCK < WORD else WORD) // LANES
    COUNT: tl.constexpr = BLOCK // (LANES * BYTES)
    lanes = tl.reshape(codes, [codes.shape[0], COUNT, BYTES, LANES])
    byte = 8 * tl.arange(0, BYTES)[None, None, :]
    word = first // WORD + tl.arange(0, COUNT)
    words = (columns + WORD - 1) // WORD
    target = pointer + row[:, None] * (BITS * words) + word[None, :]
    mask = row_mask[:, None] & (word < words)[None, :]
    left = columns - word * WORD
    keep = tl.where(left < WORD, (1 << (left & (WORD - 1))) - 1, -1)[None, :]  # bits of channels that exist
    eight = eight_codes(lanes if BITS <= 4 else lanes & 15)
    for plane in tl.static_range(BITS):
        if plane == 4:
            eight = eight_codes(lanes >> 4)
        packed = tl.sum(((eight >> (8 * (plane % 4))) & 255) << byte, axis=2) & keep
        tl.store(target + plane * words, packed, mask=mask)


@triton.jit
def store_nibbles(pointer, pitch, codes, row, row_mask, first):
    """Nibbles int32 [M, pitch] of codes int32 [R, BLOCK], all below 16 (gpu/layout.py).

    `first` is a multiple of BLOCK, and BLOCK one of 8. Nibbles beyond the last channel are whatever codes they had.
    """
    lanes = tl.reshape(codes, [codes.shape[0], codes.shape[1] // 8, 8])
    place = tl.arange(0, 8)
    words = tl.sum(lanes << (8 * (place % 4) + 4 * (place // 4))[None, None, :], axis=2)  # disjoint: an OR
    word = first // 8 + tl.arange(0, codes.shape[1] // 8)
    tl.store(pointer + row[:, None] * pitch + word[None, :], words, mask=row_mask[:, None] & (word < pitch)[None, :])


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` current while kernels are launched; nothing on the CPU (interpreter)."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
