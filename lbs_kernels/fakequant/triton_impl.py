"""The quantizers of training in Triton: one pass forward, one backward, nothing that waits for the device.

    unsigned   q = clamp(rint(x * (n / v)), -z, n - z)              y = q * (v / n)             range [-low v, high v]
    signed     q = clamp(rint(x * (n / 2 v) + n / 2), 0, n)         y = (2 q - n) * (v / n)     range [-v, v]
    weight     q = rint(clamp(x / v, -1, 1) * (n / 2) + n / 2)      y = (2 q - n) * (v / n)     range [-v, v]
    zero       q = rint(clamp(x / v, -1, 1) * m), m = (n - 1) / 2   y = q * (v / m)             range [-v, v]

    forward    y at the open width;  errors[j] = mean |clip(x) - y_j| / (v, or 2 v) at each width compared with
    backward   gx = gy inside the range, else 0;  products[j] = sum gy * (y - y_j)
               grad v = sum gy * ((y - x) / v inside,   high above,   -low below);   all but unsigned: low = high = 1

z = low * n, a whole number; low = 0 and high = 1 where there are no negative values.
v is one range, or one for every filter of weights, whose elements lie together. The range is |v|: a v below 0 means -v,
and gets the gradient's other sign.

Arithmetic is float32, whatever x is, and rounds where torch rounds on a CPU: y and gx have the same bits. v, and the
open width where it was decided on the device, are read by the kernels. Every program sums its block in float32 and
leaves the sum in a place of its own; `total_kernel` adds those in float64, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, device_guard, load_stream, store_stream
from lbs_kernels.gpu.triton.emit import RINT_MAGIC

BLOCK = 2048  # elements of one program
WARPS = 8  # 8 elements a thread: 16 bytes in half precision; with 16 the backward pass takes up to 128 registers
CHUNK = 1024  # partial sums added at a time
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@triton.jit
def load_levels(bits_ptr, OPEN: tl.constexpr):
    """n = 2^b - 1 of the open width as float32: OPEN, or the int64 scalar at bits_ptr where OPEN is None."""
    bits = tl.load(bits_ptr) if OPEN is None else tl.full((), OPEN, tl.int32)
    return ((1 << bits) - 1).to(tl.float32)


@triton.jit
def unit(x, v, KIND: tl.constexpr):
    """What codes are made of: x, or clip(x / v, -1, 1) of weights. Here and below comparisons let NaN through."""
    result = x
    if KIND == "weight" or KIND == "zero":
        result = tl.div_rn(x, tl.zeros_like(x) + v)
        result = tl.where(result < -1.0, -1.0, tl.where(result > 1.0, 1.0, result))
    return result


@triton.jit
def decoded(u, v, n, low, KIND: tl.constexpr):
    """y of `unit` values at the width of n levels. Bounds are integers: clamping before rint is clamping after it.

    low: the share of the range below 0; real 0 has the code rint(low * n), which is a whole number but for rounding.
    """
    half = n * 0.5
    if KIND == "zero":
        half = half - 0.5  # 2^(b - 1) - 1: units of the largest weight
        t = u * half
    elif KIND == "weight":
        t = u * half + half
    else:
        t = u * tl.div_rn(n, 2.0 * v if KIND == "signed" else v)
        lowest = 0.0
        if KIND == "signed":
            t = t + half
        else:
            lowest = -((low * n + RINT_MAGIC) - RINT_MAGIC)
        t = tl.where(t < lowest, lowest, tl.where(t > n + lowest, n + lowest, t))
    q = (t + RINT_MAGIC) - RINT_MAGIC
    if KIND == "zero":
        n = half
    elif KIND != "unsigned":
        q = 2.0 * q - n
    return q * tl.div_rn(v, n)


@triton.jit
def own_block(count, blocks, BLOCK: tl.constexpr):
    """(range, places, mask) of this program's elements: `blocks` programs share a range and its `count` elements."""
    row = tl.program_id(0) // blocks
    offset = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, row.to(tl.int64) * count + offset, offset < count


@triton.jit
def forward_kernel(
    x_ptr, v_ptr, bits_ptr, y_ptr, parts_ptr, count, blocks, low, high,
    OPEN: tl.constexpr, COARSE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [count] and, at each width of COARSE, this program's sum |clip(x) - y_b|: parts [len(COARSE), programs]."""
    row, place, mask = own_block(count, blocks, BLOCK)
    x = load_stream(x_ptr + place, mask, DTYPE)
    v = tl.abs(tl.load(v_ptr + row))
    u = unit(x, v, KIND)
    store_stream(y_ptr + place, decoded(u, v, load_levels(bits_ptr, OPEN), low, KIND), mask, DTYPE)
    clipped = tl.where(x < -low * v, -low * v, tl.where(x > high * v, high * v, x))
    for j in tl.static_range(len(COARSE)):
        error = tl.abs(clipped - decoded(u, v, load_levels(None, COARSE[j]), low, KIND))
        part = tl.sum(tl.where(mask, error, 0.0))
        tl.store(parts_ptr + j * tl.num_programs(0) + tl.program_id(0), part)


@triton.jit
def correct_kernel(
    x_ptr, v_ptr, bits_ptr, guess_ptr, y_ptr, count, blocks, low,
    KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y again where it was computed at another width than the one that is open."""
    if tl.load(bits_ptr) != tl.load(guess_ptr):
        row, place, mask = own_block(count, blocks, BLOCK)
        v = tl.abs(tl.load(v_ptr + row))
        u = unit(load_stream(x_ptr + place, mask, DTYPE), v, KIND)
        store_stream(y_ptr + place, decoded(u, v, load_levels(bits_ptr, None), low, KIND), mask, DTYPE)


@triton.jit
def backward_kernel(
    x_ptr, gy_ptr, v_ptr, bits_ptr, gx_ptr, parts_ptr, count, blocks, low, high,
    OPEN: tl.constexpr, COARSE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gx [count] and this program's sums, parts [len(COARSE) + 1, programs]: gy * (y - y_b), and the gradient of v."""
    row, place, mask = own_block(count, blocks, BLOCK)
    x = load_stream(x_ptr + place, mask, DTYPE)
    gy = load_stream(gy_ptr + place, mask, DTYPE)  # 0 where nothing exists
    edge = tl.load(v_ptr + row)
    v = tl.abs(edge)
    u = unit(x, v, KIND)
    y = decoded(u, v, load_levels(bits_ptr, OPEN), low, KIND)
    inside = (x >= -low * v) & (x <= high * v)
    store_stream(gx_ptr + place, tl.where(inside, gy, 0.0), mask, DTYPE)
    edge_slope = tl.where(x > high * v, high, tl.where(x < -low * v, -low, 0.0))  # a NaN has none
    slope = tl.where(inside, (y - x) * tl.div_rn(tl.full((), 1.0, tl.float32), v), edge_slope)
    part = parts_ptr + tl.program_id(0)
    for j in tl.static_range(len(COARSE)):
        product = gy * (y - decoded(u, v, load_levels(None, COARSE[j]), low, KIND))
        tl.store(part + j * tl.num_programs(0), tl.sum(product))
    sign = tl.where(edge < 0.0, -1.0, 1.0)
    tl.store(part + len(COARSE) * tl.num_programs(0), tl.sum(gy * slope) * sign)


@triton.jit
def total_kernel(
    parts_ptr, v_ptr, totals_ptr, parts, count, MEAN: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr
):
    """totals [rows] of parts [rows, parts], row by row; MEAN: over `count` elements, in units of the range."""
    row = tl.program_id(0)
    column = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), tl.float64)
    first = 0
    while first < parts:  # no range: the interpreter of Triton 3.6 cannot count to an argument with numpy 2.4
        place = first + column
        sums += tl.load(parts_ptr + row.to(tl.int64) * parts + place, mask=place < parts, other=0.0).to(tl.float64)
        first += CHUNK
    total = tl.sum(sums)
    if MEAN:
        v = tl.abs(tl.load(v_ptr)).to(tl.float64)
        total = total / ((v if KIND == "unsigned" else 2.0 * v) * count)
    tl.store(totals_ptr + row, total.to(tl.float32))


def told(bits: int | Tensor) -> tuple[Tensor | None, int | None]:
    """The open width as a pointer or as a constant of the kernel; the other is None."""
    return (bits, None) if isinstance(bits, Tensor) else (None, bits)


def warps_of(block: int) -> int:
    """Warps of a program of `block` elements: as many as have something to do."""
    return max(1, min(WARPS, block // 32))


@dataclass(frozen=True)
class Split:
    """How elements are shared among programs: `blocks` of them, of `block` elements each, for every range."""

    ranges: int
    count: int  # elements of one range
    blocks: int
    block: int

    @property
    def programs(self) -> int:
        return self.ranges * self.blocks


def split_by_range(x: Tensor, v: Tensor) -> Split:
    """Programs for x, whose elements have one range, or one for each x[o]."""
    ranges = v.numel()
    count = x.numel() // ranges
    block = BLOCK if ranges == 1 else min(BLOCK, triton.next_power_of_2(max(count, 1)))
    return Split(ranges, count, triton.cdiv(count, block), block)


def _meta(x: Tensor, kind: str, block: int) -> dict[str, Any]:
    return {
        "KIND": kind, "DTYPE": DTYPES[x.dtype], "BLOCK": block, "num_warps": warps_of(block), **LAUNCH_OPTIONS
    }  # fmt: skip


def _shares(kind: str, shares: tuple[float, float] | None) -> tuple[float, float]:
    if shares is not None:
        return shares
    return (0.0, 1.0) if kind == "unsigned" else (1.0, 1.0)


def _raw(x: Tensor) -> Tensor:
    """bfloat16 as int16: the kernels round it themselves."""
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


def totals_of(parts: Tensor, v: Tensor, count: int, mean: bool, kind: str) -> Tensor:
    """float32 [rows] of parts float32 [rows, programs]."""
    rows, programs = parts.shape
    totals = parts.new_empty(rows)
    if rows:
        total_kernel[(rows,)](
            parts, v, totals, programs, max(count, 1), MEAN=mean, KIND=kind, CHUNK=CHUNK, **LAUNCH_OPTIONS
        )
    return totals


def forward(
    x: Tensor,
    v: Tensor,
    coarse: tuple[int, ...],
    bits: int | Tensor,
    kind: str,
    shares: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y like x, mean |z - z_b| float32 [J] at the widths of `coarse`), z in 0..1 over the range.

    Arguments:
        x: float32, bfloat16 or float16, dense in memory in any order. v: float32 on x's device, not 0: a scalar, or one
            for each x[o], which are dense too. bits: the open width, 1 to 8, an int64 scalar there if the device has
            decided it. kind: unsigned, signed, weight or zero.
        shares: (low, high) of unsigned values, so that low * n is a whole number at every width; (0, 1) unless given.
    """
    y, (bits_ptr, opened), split = torch.empty_like(x), told(bits), split_by_range(x, v)
    parts = torch.empty(len(coarse), split.programs, dtype=torch.float32, device=x.device)
    with device_guard(x.device):
        if split.count:
            forward_kernel[(split.programs,)](
                _raw(x), v, bits_ptr, _raw(y), parts, split.count, split.blocks, *_shares(kind, shares),
                OPEN=opened, COARSE=coarse, **_meta(x, kind, split.block),
            )  # fmt: skip
        if split.ranges == 1:
            return y, totals_of(parts, v, split.count, True, kind)
        sums = totals_of(parts.view(-1, split.blocks), v, 1, False, kind).view(len(coarse), split.ranges)
        return y, (sums / (2 * v.abs().view(-1))).sum(1) / x.numel()


def correct(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    bits: Tensor,
    guess: Tensor,
    kind: str,
    shares: tuple[float, float] | None = None,
) -> None:
    """Make y, which `forward` computed at the width `guess`, that of the width `bits`: a pass where they differ."""
    split = split_by_range(x, v)
    if split.count:
        with device_guard(x.device):
            correct_kernel[(split.programs,)](
                _raw(x), v, bits, guess, _raw(y), split.count, split.blocks, _shares(kind, shares)[0],
                **_meta(x, kind, split.block),
            )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    v: Tensor,
    coarse: tuple[int, ...],
    bits: int | Tensor,
    kind: str,
    shares: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx like x, grad v float32 like v, products float32 [J]); grad has x's dtype and strides, the rest as above."""
    grad_x, (bits_ptr, opened), split = torch.empty_like(x), told(bits), split_by_range(x, v)
    parts = torch.empty(len(coarse) + 1, split.programs, dtype=torch.float32, device=x.device)
    with device_guard(x.device):
        if split.count:
            backward_kernel[(split.programs,)](
                _raw(x), _raw(grad), v, bits_ptr, _raw(grad_x), parts, split.count, split.blocks,
                *_shares(kind, shares), OPEN=opened, COARSE=coarse, **_meta(x, kind, split.block),
            )  # fmt: skip
        if split.ranges == 1:
            totals = totals_of(parts, v, split.count, False, kind)
            return grad_x, totals[-1].view(v.shape), totals[:-1]
        own = totals_of(parts[-1].view(split.ranges, split.blocks), v, 1, False, kind)
        return grad_x, own.view(v.shape), totals_of(parts[:-1], v, 1, False, kind)
