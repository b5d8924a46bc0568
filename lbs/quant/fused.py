"""Quantizers of training in one pass each way: native on the CPU, Triton on a GPU; the codec's codes, bit for bit.

The range is |v|, not 0. Nothing on a GPU is read back: v, and widths the device has decided, stay there.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from lbs.quant import codec
from lbs_kernels import extension

_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(x: Tensor, v: Tensor, coding: codec.Coding) -> bool:
    """Whether one pass serves this tensor: a float32 v, and x dense in memory, of a dtype its device takes.

    v: a scalar; of weights also one range for every filter [O, 1, ..]. Activations anywhere; weights on a GPU only, and
    in float32, where codes are computed in the weights' own dtype.
    """
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    by_filter = coding.is_weight and x.dim() and v.shape == (x.shape[0], *[1] * (x.dim() - 1))
    if not dense or v.dtype != torch.float32 or x.device != v.device or (v.dim() and not by_filter):
        return False
    if x.is_cuda:
        return _has_triton() and (x.dtype in _GPU_DTYPES if not coding.is_weight else x.dtype == torch.float32)
    return extension.cpu is not None and x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES and not coding.is_weight


def forward(
    x: Tensor, v: Tensor, coarse: tuple[int, ...], bits: int | Tensor, coding: codec.Coding
) -> tuple[Tensor, Tensor]:
    """(y = decode(encode(x)) at the width `bits`, mean |z - z_b| [J] at the widths of `coarse`), z in 0..1.

    Sums are taken in float32 over blocks of 2048 elements and in float64 from there on, in an order that depends on
    nothing but the number of elements.

    Arguments:
        bits: an int64 scalar on x's device where the device has decided it.
    """
    if x.is_cuda:
        from lbs_kernels.fakequant import triton_impl

        return triton_impl.forward(x, v, coarse, bits, coding.kind, coding.shares)
    y, v = torch.empty_like(x), v.abs()
    sums = _native_forward(x, v, (*coarse, int(bits)), coding, y)
    scale = float(v) * sum(coding.shares) * max(x.numel(), 1)
    return y, torch.tensor([total / scale for total in sums], dtype=v.dtype)


def correct(y: Tensor, x: Tensor, v: Tensor, bits: int | Tensor, guess: int | Tensor, coding: codec.Coding) -> None:
    """Overwrite y, which `forward` computed at the width `guess`, with what it is at `bits`, where they differ."""
    if isinstance(bits, Tensor) and isinstance(guess, Tensor):
        from lbs_kernels.fakequant import triton_impl

        triton_impl.correct(y, x, v, bits, guess, coding.kind, coding.shares)
    elif bits != guess:
        _native_forward(x, v.abs(), (int(bits),), coding, y)


def backward(
    grad: Tensor, x: Tensor, v: Tensor, coarse: tuple[int, ...], bits: int | Tensor, coding: codec.Coding
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients of y at the width `bits` to x and v, and sum dL/dy * (y - y_b) [J] for `coarse`."""
    grad = _like(grad, x)
    if x.is_cuda:
        from lbs_kernels.fakequant import triton_impl

        return triton_impl.backward(grad, x, v, coarse, bits, coding.kind, coding.shares)
    grad_x = torch.empty_like(x)
    total, products = extension.require_cpu().fake_quant_backward(
        x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), x.numel(),
        *_widths(v.abs(), (*coarse, int(bits)), coding), coding.shares, coding.kind == "signed",
        torch.get_num_threads(), _NATIVE_DTYPES[x.dtype],
    )  # fmt: skip
    return grad_x, torch.full_like(v, total) * v.sign(), torch.tensor(products, dtype=v.dtype)


def weight_forward(w: Tensor, v: Tensor, scale: Tensor, bits: int | Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(scale * decode(encode(w / std)), std) on a GPU; see `fake.standardized_weight`."""
    from lbs_kernels.fakequant import triton_weights

    return triton_weights.forward(w, v, scale, bits, kind)


def weight_backward(
    grad: Tensor, w: Tensor, v: Tensor, scale: Tensor, std: Tensor, bits: int | Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Gradients to w and v."""
    from lbs_kernels.fakequant import triton_weights

    return triton_weights.backward(_like(grad, w), w, v, scale, std, bits, kind)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """grad in the dtype and the order of memory of x."""
    return grad if grad.stride() == x.stride() and grad.dtype == x.dtype else torch.empty_like(x).copy_(grad)


def _widths(
    v: Tensor, widths: tuple[int, ...], coding: codec.Coding
) -> tuple[float, list[float], list[float], list[float], list[float]]:
    """(v; scale, step, n and the code of 0 of each width), each number rounded as the codec rounds it."""
    scales = [float(codec.activation_scale(v, bits, coding.kind == "signed")) for bits in widths]
    steps = [float(codec.code_step(v, bits)) for bits in widths]
    zeros = [float(coding.zero_at(bits)) for bits in widths]
    return float(v), scales, steps, [float(codec.levels(bits)) for bits in widths], zeros


def _native_forward(x: Tensor, v: Tensor, widths: tuple[int, ...], coding: codec.Coding, y: Tensor) -> list[float]:
    """Fill y at the last of `widths`; sum |clip(x) - y_b| at the others."""
    sums: list[float] = extension.require_cpu().fake_quant_forward(
        x.data_ptr(), y.data_ptr(), x.numel(), *_widths(v, widths, coding), coding.shares, coding.kind == "signed",
        torch.get_num_threads(), _NATIVE_DTYPES[x.dtype],
    )  # fmt: skip
    return sums
