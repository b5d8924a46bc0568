"""The gated decomposition: z_hat = z_b1 + g_2 (r_b2 + g_3 (r_b3 + ...)) (LBS eq. 8-13).

The residuals sum to the direct quantization D(z, s_b) of the open width, so the value is taken from the codec; only
the gradient to the gates needs the other widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbs.quant import codec
from lbs.quant.fake import ste_gradients
from lbs.search.distributed import reduce_mean
from lbs.search.gates import BitGate


def gate_statistics(x: Tensor, v: Tensor, gate: BitGate, kind: str) -> Tensor:
    """A_j = mean |z - z_hat_(j-1)| for every gate, float [J].

    Gates behind a closed one see the same partial sum as that one: the value they would refine. Several processes
    take the mean over all their batches one gate after the other, so that all of them decide alike.
    """
    z_scale = v if kind == "unsigned" else 2 * v
    clipped = x.clamp(0 if kind == "unsigned" else -v.item(), v.item())
    values: list[Tensor] = []
    closed = False
    for j, bits in enumerate(gate.chain[:-1]):
        closed = closed or bool(j and values[-1] <= gate.alpha[j - 1])
        if closed:
            values.append(values[-1])
            continue
        values.append(reduce_mean((clipped - codec.round_trip(x, v, bits, kind)).abs_().mean() / z_scale))
    return torch.stack(values)


class _Gated(torch.autograd.Function):
    """Value at the open width; straight-through to x and v; to the gates as `_gate_gradients` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, gates: Tensor, chain: tuple[int, ...], level: int, kind: str) -> Tensor:
        y = codec.round_trip(codec.wide(x), v, chain[level], kind).to(x.dtype)
        ctx.save_for_backward(x, v, y)
        ctx.setup = (chain, level, kind)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v, y = ctx.saved_tensors
        chain, level, kind = ctx.setup
        grad_x, grad_v = ste_gradients(grads[0], x, v, y, kind != "unsigned")
        return grad_x, grad_v, _gate_gradients(grads[0], x, v, y, chain, level, kind), None, None, None


def _gate_gradients(
    grad: Tensor, x: Tensor, v: Tensor, y: Tensor, chain: tuple[int, ...], level: int, kind: str
) -> Tensor:
    """dL/dg [J]: for an open gate j the sum of dL/dy * (y - y_(j-1)), for the first closed one of dL/dy * (y_j - y).

    Gates behind a closed one get none, and count as closed in the gradient of the one before them: a gate re-opens
    for the next width only.
    """
    wide_grad, wide_x, wide_y = codec.wide(grad), codec.wide(x), codec.wide(y)
    result = torch.zeros(len(chain) - 1, dtype=v.dtype, device=v.device)
    for j in range(min(level + 1, len(chain) - 1)):
        other = codec.round_trip(wide_x, v, chain[j] if j < level else chain[level + 1], kind)
        difference = wide_y - other if j < level else other - wide_y
        result[j] = (wide_grad * difference).sum()
    return result


def gated(x: Tensor, v: Tensor, gate: BitGate, kind: str) -> Tensor:
    """Quantize x with the gates of `gate`, which decide on this batch; differentiable in x, v and alpha.

    Arguments:
        x: any shape, floating. v: positive scalar. kind: `unsigned`, `signed` or `weight`.
    """
    with torch.no_grad():
        statistics = gate_statistics(codec.wide(x), v, gate, kind)
    gates = gate.observe(statistics)
    return _Gated.apply(x, v, gates, gate.chain, gate.level, kind)
