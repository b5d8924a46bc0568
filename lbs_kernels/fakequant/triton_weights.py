"""Standardised weights quantized in Triton: two kernels each way instead of some twenty small operations a layer.

    std = the standard deviation of w, 1 where all w are equal              y = scale * decoded(w / std) at |range|
    gw  = scale * gy / std inside the range, else 0                         grad range = sum scale * gy * slope

`decoded` and the slope are those of kind `weight` in triton_impl.py. Sums are float64, of differences from the first
weight, so that equal weights deviate by 0 exactly; products and quotients round as torch rounds them on a CPU, one by
one. Only the deviation may differ from torch's in its last bit of float64 before it is rounded to float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.fakequant.triton_impl import (
    BLOCK,
    CHUNK,
    WARPS,
    decoded,
    load_levels,
    own_block,
    told,
    totals_of,
    unit,
)
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, device_guard

_META = {"BLOCK": BLOCK, "num_warps": WARPS, **LAUNCH_OPTIONS}


@triton.jit
def moments_kernel(w_ptr, parts_ptr, count, BLOCK: tl.constexpr):
    """This program's sums of w - w[0] and of its square: parts float64 [2, programs]."""
    place, mask = own_block(count, BLOCK)
    first = tl.load(w_ptr).to(tl.float64)
    away = tl.where(mask, tl.load(w_ptr + place, mask=mask, other=0.0).to(tl.float64) - first, 0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(away))
    tl.store(parts_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(away * away))


@triton.jit
def deviation(parts_ptr, count, CHUNK: tl.constexpr):
    """float32 standard deviation from `moments_kernel`'s sums, which every program adds in the same order."""
    programs = tl.num_programs(0)
    column = tl.arange(0, CHUNK)
    sums, squares = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float64)
    first = 0
    while first < programs:  # no range: see total_kernel
        place = first + column
        sums += tl.load(parts_ptr + place, mask=place < programs, other=0.0)
        squares += tl.load(parts_ptr + programs + place, mask=place < programs, other=0.0)
        first += CHUNK
    mean = tl.sum(sums) / count
    variance = tl.sum(squares) / count - mean * mean
    std = tl.sqrt(tl.where(variance > 0.0, variance, 0.0)).to(tl.float32)
    return tl.where(std > 0.0, std, 1.0)


@triton.jit
def forward_kernel(
    w_ptr, parts_ptr, range_ptr, scale_ptr, bits_ptr, y_ptr, std_ptr, count,
    OPEN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [count], and the deviation, which the first program keeps at std_ptr."""
    place, mask = own_block(count, BLOCK)
    w = tl.load(w_ptr + place, mask=mask, other=0.0)
    std = deviation(parts_ptr, count, CHUNK)
    if tl.program_id(0) == 0:
        tl.store(std_ptr, std)
    v = tl.abs(tl.load(range_ptr))
    u = unit(tl.div_rn(w, tl.zeros_like(w) + std), v, "weight")
    y = decoded(u, v, load_levels(bits_ptr, OPEN), 1.0, "weight") * tl.load(scale_ptr)
    tl.store(y_ptr + place, y, mask=mask)


@triton.jit
def backward_kernel(
    w_ptr, gy_ptr, std_ptr, range_ptr, scale_ptr, bits_ptr, gw_ptr, parts_ptr, count,
    OPEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gw [count], and this program's part of the gradient of the range: parts [programs]."""
    place, mask = own_block(count, BLOCK)
    w = tl.load(w_ptr + place, mask=mask, other=0.0)
    grad = tl.load(gy_ptr + place, mask=mask, other=0.0) * tl.load(scale_ptr)
    std, edge = tl.load(std_ptr), tl.load(range_ptr)
    v = tl.abs(edge)
    x = tl.div_rn(w, tl.zeros_like(w) + std)
    inside = (x >= -v) & (x <= v)
    gw = tl.div_rn(tl.where(inside, grad, 0.0), tl.zeros_like(w) + std)
    tl.store(gw_ptr + place, gw, mask=mask)
    y = decoded(unit(x, v, "weight"), v, load_levels(bits_ptr, OPEN), 1.0, "weight")
    slope = tl.where(inside, (y - x) * tl.div_rn(tl.full((), 1.0, tl.float32), v), tl.where(x > v, 1.0, -1.0))
    sign = tl.where(edge < 0.0, -1.0, 1.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(grad * slope) * sign)


def forward(w: Tensor, edge: Tensor, scale: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
    """(quantized weights like w, their deviation float32 scalar).

    Arguments:
        w: float32, at least one element, dense in memory in any order. edge, scale: float32 scalars on w's device; the
            range is |edge|. bits: 1 to 8, an int64 scalar there if the device has decided it.
    """
    y, count, (bits_ptr, opened) = torch.empty_like(w), w.numel(), told(bits)
    programs = triton.cdiv(count, BLOCK)
    parts = torch.empty(2, programs, dtype=torch.float64, device=w.device)
    std = torch.empty_like(edge)
    with device_guard(w.device):
        moments_kernel[(programs,)](w, parts, count, **_META)
        forward_kernel[(programs,)](
            w, parts, edge, scale, bits_ptr, y, std, count, OPEN=opened, CHUNK=CHUNK, **_META
        )  # fmt: skip
    return y, std


def backward(
    grad: Tensor, w: Tensor, edge: Tensor, scale: Tensor, std: Tensor, bits: int | Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient like w, gradient of `edge`); grad has w's dtype and strides, std is `forward`'s."""
    grad_w, count, (bits_ptr, opened) = torch.empty_like(w), w.numel(), told(bits)
    programs = triton.cdiv(count, BLOCK)
    parts = torch.empty(1, programs, dtype=torch.float32, device=w.device)
    with device_guard(w.device):
        backward_kernel[(programs,)](
            w, grad, std, edge, scale, bits_ptr, grad_w, parts, count, OPEN=opened, **_META
        )  # fmt: skip
        return grad_w, totals_of(parts, edge, count, False, "weight")[0]
