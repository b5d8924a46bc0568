"""Standardised weights quantized in Triton: two kernels each way instead of some twenty small operations a layer.

    std = the standard deviation of w, 1 where all w are equal              y = scale * decoded(w / std) at |range|
    gw  = scale * gy / std inside the range, else 0                         grad range = sum scale * gy * slope

`decoded` and the slope are those of kind `weight` in triton_impl.py. Sums are float64, of differences from the first
weight, so that equal weights deviate by 0 exactly; products and quotients round as torch rounds them on a CPU, one by
one. Only the deviation may differ from torch's in its last bit of float64 before it is rounded to float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.fakequant.triton_impl import (
    BLOCK,
    CHUNK,
    WARPS,
    Split,
    decoded,
    load_levels,
    own_block,
    split_by_range,
    told,
    totals_of,
    unit,
    warps_of,
)
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS, device_guard

_META = {"BLOCK": BLOCK, "num_warps": WARPS, **LAUNCH_OPTIONS}


@triton.jit
def moments_kernel(w_ptr, parts_ptr, count, BLOCK: tl.constexpr):
    """This program's sums of w - w[0] and of its square: parts float64 [2, programs]."""
    _, place, mask = own_block(count, tl.num_programs(0), BLOCK)
    first = tl.load(w_ptr).to(tl.float64)
    away = tl.where(mask, tl.load(w_ptr + place, mask=mask, other=0.0).to(tl.float64) - first, 0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(away))
    tl.store(parts_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(away * away))


@triton.jit
def deviation(parts_ptr, programs, count, CHUNK: tl.constexpr):
    """float32 standard deviation from the sums of `moments_kernel`'s programs, which all add in the same order."""
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
    w_ptr, parts_ptr, range_ptr, scale_ptr, bits_ptr, y_ptr, std_ptr, parts, total, count, blocks,
    OPEN: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y, and the deviation of all `total` weights, which the first program keeps at std_ptr."""
    row, place, mask = own_block(count, blocks, BLOCK)
    w = tl.load(w_ptr + place, mask=mask, other=0.0)
    std = deviation(parts_ptr, parts, total, CHUNK)
    if tl.program_id(0) == 0:
        tl.store(std_ptr, std)
    v = tl.abs(tl.load(range_ptr + row))
    u = unit(tl.div_rn(w, tl.zeros_like(w) + std), v, KIND)
    y = decoded(u, v, load_levels(bits_ptr, OPEN), 1.0, KIND) * tl.load(scale_ptr)
    tl.store(y_ptr + place, y, mask=mask)


@triton.jit
def backward_kernel(
    w_ptr, gy_ptr, std_ptr, range_ptr, scale_ptr, bits_ptr, gw_ptr, parts_ptr, count, blocks,
    OPEN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gw, and this program's part of the gradient of its range: parts [programs]."""
    row, place, mask = own_block(count, blocks, BLOCK)
    w = tl.load(w_ptr + place, mask=mask, other=0.0)
    grad = tl.load(gy_ptr + place, mask=mask, other=0.0) * tl.load(scale_ptr)
    std, edge = tl.load(std_ptr), tl.load(range_ptr + row)
    v = tl.abs(edge)
    x = tl.div_rn(w, tl.zeros_like(w) + std)
    inside = (x >= -v) & (x <= v)
    gw = tl.div_rn(tl.where(inside, grad, 0.0), tl.zeros_like(w) + std)
    tl.store(gw_ptr + place, gw, mask=mask)
    y = decoded(unit(x, v, KIND), v, load_levels(bits_ptr, OPEN), 1.0, KIND)
    slope = tl.where(inside, (y - x) * tl.div_rn(tl.full((), 1.0, tl.float32), v), tl.where(x > v, 1.0, -1.0))
    sign = tl.where(edge < 0.0, -1.0, 1.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(grad * slope) * sign)


def forward(w: Tensor, edge: Tensor, scale: Tensor, bits: int | Tensor, kind: str = "weight") -> tuple[Tensor, Tensor]:
    """(quantized weights like w, their deviation float32 scalar).

    Arguments:
        w: float32, at least one element, dense in memory in any order. edge, scale: float32 on w's device, scale a
            scalar; the range is |edge|, a scalar or one for each w[o]. bits: 1 to 8, an int64 scalar there if the
            device has decided it. kind: weight, or zero.
    """
    y, count, (bits_ptr, opened), split = torch.empty_like(w), w.numel(), told(bits), split_by_range(w, edge)
    programs = triton.cdiv(count, BLOCK)
    parts = torch.empty(2, programs, dtype=torch.float64, device=w.device)
    std = torch.empty_like(scale)
    with device_guard(w.device):
        moments_kernel[(programs,)](w, parts, count, **_META)
        forward_kernel[(split.programs,)](
            w, parts, edge, scale, bits_ptr, y, std, programs, count, split.count, split.blocks,
            OPEN=opened, KIND=kind, CHUNK=CHUNK, **_meta(split),
        )  # fmt: skip
    return y, std


def backward(
    grad: Tensor, w: Tensor, edge: Tensor, scale: Tensor, std: Tensor, bits: int | Tensor, kind: str = "weight"
) -> tuple[Tensor, Tensor]:
    """(gradient like w, gradient of `edge`); grad has w's dtype and strides, std is `forward`'s."""
    grad_w, (bits_ptr, opened), split = torch.empty_like(w), told(bits), split_by_range(w, edge)
    parts = torch.empty(split.ranges, split.blocks, dtype=torch.float32, device=w.device)
    with device_guard(w.device):
        backward_kernel[(split.programs,)](
            w, grad, std, edge, scale, bits_ptr, grad_w, parts, split.count, split.blocks,
            OPEN=opened, KIND=kind, **_meta(split),
        )  # fmt: skip
        return grad_w, totals_of(parts, edge, 1, False, kind).view(edge.shape)


def _meta(split: Split) -> dict[str, Any]:
    return {**_META, "BLOCK": split.block, "num_warps": warps_of(split.block)}
