"""The gated decomposition: z_hat = z_b1 + g_2 (r_b2 + g_3 (r_b3 + ...)) (LBS eq. 8-13).

The residuals sum to the direct quantization D(z, s_b) of the open width, so the value is taken from the codec; only
the gradient to the gates needs the other widths. Where `fused` serves, one pass forward gives the value and every
gate's statistic, and one pass backward all gradients; the value is computed again where this batch decides otherwise
than the last one. Elsewhere the same comes from torch operations. On a GPU neither waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbs.quant import codec, fused
from lbs.quant.fake import ste_gradients
from lbs.search.gates import BitGate
from lbs.train.distributed import reduce_mean


def width_errors(x: Tensor, v: Tensor, chain: tuple[int, ...], coding: codec.Coding) -> Tensor:
    """mean |z - z_b| at every width of the chain but the last, [J]; z in 0..1 as in LBS eq. 1-2."""
    low, high = coding.shares
    clipped = torch.minimum(torch.maximum(x, -low * v), high * v)
    width = (low + high) * v
    if not v.dim():
        return torch.stack([_error(clipped, x, v, bits, coding).mean() for bits in chain[:-1]]) / width
    return torch.stack([(_error(clipped, x, v, bits, coding) / width).mean() for bits in chain[:-1]])


def _error(clipped: Tensor, x: Tensor, v: Tensor, bits: int, coding: codec.Coding) -> Tensor:
    return (clipped - codec.round_trip(x, v, bits, coding)).abs_()


class _Gated(torch.autograd.Function):
    """Value at the open width; straight-through to x and v; to the gates as `_placed` says."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        gates: Tensor,
        chain: tuple[int, ...],
        level: int | Tensor,
        bits: int | Tensor,
        coding: codec.Coding,
    ) -> Tensor:
        y = codec.round_trip(codec.wide(x), v, bits, coding).to(x.dtype)  # type: ignore[arg-type]
        ctx.save_for_backward(x, v, y)
        ctx.setup = (chain, level, coding)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v, y = ctx.saved_tensors
        chain, level, coding = ctx.setup
        grad_x, grad_v = ste_gradients(grads[0], x, v, y, coding)
        grad, wide_x, wide_y = codec.wide(grads[0]), codec.wide(x), codec.wide(y)
        products = [
            (grad * (wide_y - codec.round_trip(wide_x, v, bits, coding))).sum() for bits in _compared(chain, level)
        ]
        return grad_x, grad_v, _placed(torch.stack(products).to(v.dtype), chain, level), *[None] * 4


class _FusedGated(torch.autograd.Function):
    """The same in one pass. `value` holds y, which the statistics' pass has left behind."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        gates: Tensor,
        value: list[Tensor],
        chain: tuple[int, ...],
        level: int | Tensor,
        bits: int | Tensor,
        coding: codec.Coding,
    ) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.setup = (chain, level, bits, coding)
        return value.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors
        chain, level, bits, coding = ctx.setup
        grad_x, grad_v, products = fused.backward(grads[0], x, v, _compared(chain, level), bits, coding)
        return grad_x, grad_v, _placed(products, chain, level), *[None] * 5


def _compared(chain: tuple[int, ...], level: int | Tensor) -> tuple[int, ...]:
    """The widths b for whose gates sum dL/dy * (y - y_b) is needed: all where only the device knows the level."""
    return chain if isinstance(level, Tensor) else chain[:level] + chain[level + 1 : level + 2]


def _placed(products: Tensor, chain: tuple[int, ...], level: int | Tensor) -> Tensor:
    """dL/dg [J] from sum dL/dy * (y - y_b) at the widths of `_compared`.

    For an open gate j it is the sum of dL/dy * (y - y_(j-1)), for the first closed one of dL/dy * (y_j - y). Gates
    behind a closed one get none, and count as closed in the gradient of the one before them: a gate re-opens for the
    next width only.
    """
    count = len(chain) - 1
    if isinstance(level, int):
        signed = torch.cat([products[:level], -products[level:]])
        return torch.nn.functional.pad(signed, (0, count - len(signed)))
    places = torch.arange(count, device=products.device)
    closed = torch.where(places == level, -products[1:], torch.zeros_like(products[1:]))
    return torch.where(places < level, products[:-1], closed)


def gated(x: Tensor, v: Tensor, gate: BitGate, coding: codec.Coding) -> Tensor:
    """Quantize x with the gates of `gate`, which decide on this batch; differentiable in x, v and alpha.

    Arguments:
        x: any shape, floating. v: positive scalar, or one range for every filter [O, 1, ..] of weights. coding: of a
            grid that nests, all but `zero`.
    """
    one_pass = fused.serves(x, v, coding)
    guess: int | Tensor = gate.open_width() if x.is_cuda else gate.bits
    with torch.no_grad():
        if one_pass:  # at the width that was open last
            y, errors = fused.forward(x, v, gate.chain[:-1], guess, coding)
        else:
            errors = width_errors(codec.wide(x), v, gate.chain, coding)
        if not coding.is_weight:  # weights are the same on every rank
            errors = reduce_mean(errors)
    gates = gate.observe(errors)
    level: int | Tensor = gate.open_level() if x.is_cuda else gate.level
    bits: int | Tensor = gate.open_width() if x.is_cuda else gate.bits
    if not one_pass:
        return _Gated.apply(x, v, gates, gate.chain, level, bits, coding)
    with torch.no_grad():
        fused.correct(y, x, v, bits, guess, coding)
    return _FusedGated.apply(x, v, gates, [y], gate.chain, level, bits, coding)
