"""One-pass native quantizers of activations on the CPU: the codec's codes, gradients, and sums for gates."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs.quant import codec
from lbs_kernels import extension

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def serves(x: Tensor, v: Tensor) -> bool:
    """Whether the native kernels take this tensor: on the CPU, float32 or bfloat16, dense in memory, float32 range."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return (
        extension.cpu is not None
        and x.device.type == "cpu"
        and x.dtype in _DTYPE_CODES
        and dense
        and v.dtype == torch.float32
    )


def _widths(v: Tensor, widths: tuple[int, ...], signed: bool) -> tuple[float, list[float], list[float], list[float]]:
    """(v, scale, step and n of each width), each number rounded as the codec rounds it."""
    scales = [float(codec.activation_scale(v, bits, signed)) for bits in widths]
    steps = [float(v / codec.levels(bits)) for bits in widths]
    return float(v), scales, steps, [float(codec.levels(bits)) for bits in widths]


def forward(
    x: Tensor, v: Tensor, widths: tuple[int, ...], signed: bool, out: Tensor | None = None
) -> tuple[Tensor, list[float]]:
    """y = decode(encode(x)) at the last of `widths`, bit for bit the codec's, and sum |clip(x) - y_b| at the others.

    Sums are taken in float32 over blocks of 2048 elements and in float64 from there on, in an order that does not
    depend on the number of threads.
    """
    y = torch.empty_like(x) if out is None else out
    sums = extension.require_cpu().fake_quant_forward(
        x.data_ptr(), y.data_ptr(), x.numel(), *_widths(v, widths, signed), signed, torch.get_num_threads(),
        _DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y, sums


def backward(
    grad: Tensor, x: Tensor, v: Tensor, widths: tuple[int, ...], signed: bool
) -> tuple[Tensor, Tensor, list[float]]:
    """Straight-through gradients to x and v of y at the last of `widths`, and sum dL/dy * (y - y_b) at the others."""
    if grad.stride() != x.stride() or grad.dtype != x.dtype:
        grad = torch.empty_like(x).copy_(grad)
    grad_x = torch.empty_like(x)
    total, products = extension.require_cpu().fake_quant_backward(
        x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), x.numel(), *_widths(v, widths, signed), signed,
        torch.get_num_threads(), _DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return grad_x, torch.full_like(v, total), products
