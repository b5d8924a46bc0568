"""Quantize-and-decode with a straight-through gradient: the training face of the codec.

Each function here decodes exactly the codes of `codec`, and passes gradients through `round` unchanged
(LBS eq. 4). The range v learns by LSQ-like gradients: (y - x) / v inside the range, and beyond it the share of v that
the edge is (`Coding.shares`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbs.quant import codec, fused


class _Fake(torch.autograd.Function):
    """y = decode(encode(x)); arithmetic on activations in float32 whatever their dtype (autocast)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, bits: int, coding: codec.Coding) -> Tensor:
        ctx.bits, ctx.coding = bits, coding
        ctx.fused = fused.serves(x, v, coding)
        if ctx.fused:
            ctx.save_for_backward(x, v)
            return fused.forward(x, v, (), bits, coding)[0]
        y = codec.round_trip(x if coding.is_weight else codec.wide(x), v.abs(), bits, coding).to(x.dtype)
        ctx.save_for_backward(x, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused:
            x, v = ctx.saved_tensors
            grad_x, grad_v, _ = fused.backward(grads[0], x, v, (), ctx.bits, ctx.coding)
        else:
            x, v, y = ctx.saved_tensors
            grad_x, grad_v = ste_gradients(grads[0], x, v.abs(), y, ctx.coding)
            grad_v = grad_v * v.sign()
        return grad_x, grad_v, None, None


class _Standardized(torch.autograd.Function):
    """Weights over their deviation, quantized and scaled, in as few passes as there can be (on a GPU)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, scale: Tensor, bits: int, kind: str) -> Tensor:
        y, std = fused.weight_forward(w, v, scale, bits, kind)
        ctx.bits, ctx.kind = bits, kind
        ctx.save_for_backward(w, v, scale, std)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, v, scale, std = ctx.saved_tensors
        return *fused.weight_backward(grads[0], w, v, scale, std, ctx.bits, ctx.kind), None, None, None


def ste_gradients(grad: Tensor, x: Tensor, v: Tensor, y: Tensor, coding: codec.Coding) -> tuple[Tensor, Tensor]:
    """Gradients of y = decode(encode(x)) to x and v, given dL/dy.

    Returns:
        grad_x like x: grad where x lies in the range, else 0. grad_v like v (a scalar, or one range for each filter):
        sums of grad * dy/dv.
    """
    # One dimension keeps the comparison in float32: beside a scalar v, x in bfloat16 would round v.
    edge_v = v.reshape(1) if x.dim() and not v.dim() else v
    low, high = coding.shares
    below, above = x < -low * edge_v, x > high * edge_v
    outside = below | above
    grad_x = grad.masked_fill(outside, 0)
    dtype = torch.promote_types(v.dtype, torch.float32)
    inner = _summed(grad_x * (y - x), v, dtype) / v
    edge = _summed(grad.masked_fill(~above, 0), v, dtype) * high
    if low:
        edge = edge - _summed(grad.masked_fill(~below, 0), v, dtype) * low
    return grad_x, (inner + edge).to(v.dtype).reshape(v.shape)


def _summed(values: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over what one range serves, in v's shape."""
    return values.to(dtype).sum_to_size(v.shape) if v.dim() else values.sum(dtype=dtype)


def fake_activation(x: Tensor, v: Tensor, bits: int, coding: codec.Coding = codec.UNSIGNED) -> Tensor:
    """Quantized activations in x's dtype and shape, differentiable in x and v; the range is |v|, not 0.

    >>> fake_activation(torch.tensor([-1.0, 0.3, 2.0]), torch.tensor(1.0), 2).tolist()[1:]
    [0.3333333432674408, 1.0]
    """
    return _Fake.apply(x, v, bits, coding)


def fake_weight(w: Tensor, v: Tensor, bits: int, grid: str = "odd") -> Tensor:
    """Quantized weights of standardised weights w, in the range |v|, differentiable in w and v."""
    return _Fake.apply(w, v, bits, codec.WEIGHTS[grid])


def standardized_weight(w: Tensor, v: Tensor, scale: Tensor, bits: int, grid: str = "odd") -> Tensor:
    """`fake_weight(w / std(w), v, bits, grid) * scale`, differentiable in w and v; the deviation is a constant."""
    if fused.serves(w, v, codec.WEIGHTS[grid]) and w.numel():
        return _Standardized.apply(w, v, scale, bits, codec.WEIGHTS[grid].kind)
    return fake_weight(codec.standardize(w, "scale"), v, bits, grid) * scale
