"""Quantize-and-decode with a straight-through gradient: the training face of the codec.

Each function here decodes exactly the codes of `codec`, and passes gradients through `round` unchanged
(LBS eq. 4). The range v learns by LSQ-like gradients: (y - x) / v inside the range, 1 above, -1 or 0 below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbs.quant import codec
from lbs_kernels import extension


class _FakeActivation(torch.autograd.Function):
    """y = decode(encode(x)), arithmetic in float32 whatever x's dtype (autocast)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, bits: int, signed: bool) -> Tensor:
        ctx.signed, ctx.bits = signed, bits
        ctx.fused = not signed and _fusible(x, v)
        if ctx.fused:
            ctx.save_for_backward(x, v)
            return _fused_forward(x, v, bits)
        y = codec.round_trip(codec.wide(x), v, bits, "signed" if signed else "unsigned").to(x.dtype)
        ctx.save_for_backward(x, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused:
            x, v = ctx.saved_tensors
            return *_fused_backward(grads[0], x, v, ctx.bits), None, None
        x, v, y = ctx.saved_tensors
        grad_x, grad_v = ste_gradients(grads[0], x, v, y, ctx.signed)
        return grad_x, grad_v, None, None


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def _fusible(x: Tensor, v: Tensor) -> bool:
    """Whether the native one-pass kernels serve this tensor: on the CPU, dense in memory, float32 range."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return (
        extension.cpu is not None
        and x.device.type == "cpu"
        and x.dtype in _DTYPE_CODES
        and dense
        and v.dtype == torch.float32
    )


def _fused_forward(x: Tensor, v: Tensor, bits: int) -> Tensor:
    """One pass over memory; the same codes as the codec, bit for bit."""
    y = torch.empty_like(x)
    scale, step = float(codec.activation_scale(v, bits)), float(v / codec.levels(bits))
    extension.require_cpu().fake_quant_forward(
        x.data_ptr(), y.data_ptr(), x.numel(), scale, step, float(codec.levels(bits)), 0.0,
        torch.get_num_threads(), _DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return y


def _fused_backward(grad: Tensor, x: Tensor, v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One pass over memory: gradients to x and v."""
    if grad.stride() != x.stride() or grad.dtype != x.dtype:
        grad = torch.empty_like(x).copy_(grad)
    grad_x = torch.empty_like(x)
    total = extension.require_cpu().fake_quant_backward(
        x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), x.numel(), float(v), float(codec.levels(bits)),
        torch.get_num_threads(), _DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return grad_x, torch.full_like(v, total)


def ste_gradients(grad: Tensor, x: Tensor, v: Tensor, y: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Gradients of y = decode(encode(x)) to x and v, given dL/dy.

    Returns:
        grad_x like x: grad where x lies in the range, else 0. grad_v: scalar, sum of grad * dy/dv.
    """
    # One dimension keeps the comparison in float32: beside a scalar v, x in bfloat16 would round v.
    edge_v = v.reshape(1) if x.dim() else v
    below, above = x < (-edge_v if signed else 0), x > edge_v
    outside = below | above
    grad_x = grad.masked_fill(outside, 0)
    inner = (grad_x * (y - x)).sum(dtype=torch.promote_types(v.dtype, torch.float32)) / v
    edge = grad.masked_fill(~above, 0).sum(dtype=inner.dtype)
    if signed:
        edge = edge - grad.masked_fill(~below, 0).sum(dtype=inner.dtype)
    return grad_x, (inner + edge).to(v.dtype).reshape(v.shape)


def fake_activation(x: Tensor, v: Tensor, bits: int, signed: bool = False) -> Tensor:
    """Quantized activations in x's dtype and shape, differentiable in x and v.

    >>> fake_activation(torch.tensor([-1.0, 0.3, 2.0]), torch.tensor(1.0), 2).tolist()[1:]
    [0.3333333432674408, 1.0]
    """
    return _FakeActivation.apply(x, v, bits, signed)


class _FakeWeight(torch.autograd.Function):
    """Decoded weight codes, to the last bit."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, bits: int) -> Tensor:
        y = codec.round_trip(w, v, bits, "weight")
        ctx.save_for_backward(w, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, v, y = ctx.saved_tensors
        return *ste_gradients(grads[0], w, v, y, signed=True), None


def fake_weight(w: Tensor, v: Tensor, bits: int) -> Tensor:
    """Quantized weights v * (2 q - n) / n of standardised weights w, differentiable in w and v."""
    return _FakeWeight.apply(w, v, bits)
