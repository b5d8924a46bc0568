"""The gated decomposition: z_hat = z_b1 + g_2 (r_b2 + g_3 (r_b3 + ...)) (LBS eq. 8-13).

The residuals sum to the direct quantization D(z, s_b) of the open width, so the value is taken from the codec; only
the gradient to the gates needs the other widths. On the CPU one native pass forward gives the value and every gate's
statistic, and one pass backward all gradients; elsewhere the same comes from torch operations that never wait for the
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbs.quant import codec, fused
from lbs.quant.fake import ste_gradients
from lbs.search.distributed import reduce_mean
from lbs.search.gates import BitGate


def width_errors(x: Tensor, v: Tensor, chain: tuple[int, ...], kind: str) -> Tensor:
    """mean |z - z_b| at every width of the chain but the last, [J]; z in 0..1 as in LBS eq. 1-2."""
    low = torch.zeros_like(v) if kind == "unsigned" else -v
    clipped = torch.minimum(torch.maximum(x, low), v)
    errors = [(clipped - codec.round_trip(x, v, bits, kind)).abs_().mean() for bits in chain[:-1]]
    return torch.stack(errors) / (v if kind == "unsigned" else 2 * v)


class _Gated(torch.autograd.Function):
    """Value at the open width; straight-through to x and v; to the gates as `_gate_gradients` says."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, gates: Tensor, chain: tuple[int, ...], level: Tensor | int, kind: str
    ) -> Tensor:
        bits = (
            chain[level]
            if isinstance(level, int)
            else torch.tensor(chain, device=v.device).index_select(0, level.reshape(1))[0]
        )
        y = codec.round_trip(codec.wide(x), v, bits, kind).to(x.dtype)  # type: ignore[arg-type]
        ctx.save_for_backward(x, v, y)
        ctx.setup = (chain, level, kind)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v, y = ctx.saved_tensors
        chain, level, kind = ctx.setup
        grad_x, grad_v = ste_gradients(grads[0], x, v, y, kind != "unsigned")
        return grad_x, grad_v, _gate_gradients(grads[0], x, v, y, chain, level, kind), None, None, None


class _FusedGated(torch.autograd.Function):
    """The same in native passes. `value` holds y, which the statistics' pass has left behind."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        gates: Tensor,
        value: list[Tensor],
        chain: tuple[int, ...],
        level: int,
        kind: str,
    ) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.setup = (chain, level, kind)
        return value.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors
        chain, level, kind = ctx.setup
        others = chain[:level] + chain[level + 1 : level + 2]
        grad_x, grad_v, products = fused.backward(grads[0], x, v, (*others, chain[level]), kind == "signed")
        signs = [1.0] * level + [-1.0] * (len(others) - level)
        grad_gates = torch.zeros(len(chain) - 1, dtype=v.dtype)
        grad_gates[: len(others)] = torch.tensor([s * p for s, p in zip(signs, products, strict=True)], dtype=v.dtype)
        return grad_x, grad_v, grad_gates, None, None, None, None


def _gate_gradients(
    grad: Tensor, x: Tensor, v: Tensor, y: Tensor, chain: tuple[int, ...], level: Tensor | int, kind: str
) -> Tensor:
    """dL/dg [J]: for an open gate j the sum of dL/dy * (y - y_(j-1)), for the first closed one of dL/dy * (y_j - y).

    Gates behind a closed one get none, and count as closed in the gradient of the one before them: a gate re-opens
    for the next width only.
    """
    wide_grad, wide_x, wide_y = codec.wide(grad), codec.wide(x), codec.wide(y)
    result = torch.zeros(len(chain) - 1, dtype=v.dtype, device=v.device)
    if isinstance(level, int):
        for j in range(min(level + 1, len(chain) - 1)):
            other = codec.round_trip(wide_x, v, chain[j] if j < level else chain[level + 1], kind)
            result[j] = (wide_grad * (wide_y - other if j < level else other - wide_y)).sum()
        return result
    sums = torch.stack([(wide_grad * (wide_y - codec.round_trip(wide_x, v, bits, kind))).sum() for bits in chain])
    places = torch.arange(len(chain) - 1, device=v.device)
    opened, first_closed = places < level, places == level
    return torch.where(opened, sums[:-1], torch.where(first_closed, -sums[1:], result)).to(v.dtype)


def gated(x: Tensor, v: Tensor, gate: BitGate, kind: str) -> Tensor:
    """Quantize x with the gates of `gate`, which decide on this batch; differentiable in x, v and alpha.

    Arguments:
        x: any shape, floating. v: positive scalar. kind: `unsigned`, `signed` or `weight`.
    """
    if kind != "weight" and fused.serves(x, v):
        return _gated_natively(x, v, gate, kind)
    with torch.no_grad():
        errors = width_errors(codec.wide(x), v, gate.chain, kind)
        if kind != "weight":  # weights are the same on every rank
            errors = reduce_mean(errors)
    gates = gate.observe(errors)
    level = gate.open_level() if x.is_cuda else gate.level
    return _Gated.apply(x, v, gates, gate.chain, level, kind)


def _gated_natively(x: Tensor, v: Tensor, gate: BitGate, kind: str) -> Tensor:
    """One pass at the width that was open last; another one only where this batch decides otherwise."""
    chain, expected, signed = gate.chain, gate.level, kind == "signed"
    with torch.no_grad():
        y, sums = fused.forward(x, v, (*chain[:-1], chain[expected]), signed)
        scale = float(v) * (2 if signed else 1) * max(x.numel(), 1)
        errors = reduce_mean(torch.tensor([total / scale for total in sums], dtype=v.dtype))
    gates = gate.observe(errors)
    if gate.level != expected:
        with torch.no_grad():
            y, _ = fused.forward(x, v, (chain[gate.level],), signed, out=y)
    return _FusedGated.apply(x, v, gates, [y], chain, gate.level, kind)
