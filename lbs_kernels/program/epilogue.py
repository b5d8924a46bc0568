"""Steps 1-6 of the epilogue in plain torch: what every back end must reproduce bit for bit.

    f = float32(acc);  y = fma(f, M[o], B[o])                       one rounding
    y = activation(y);  y = y * float32(gate);  y = y + float32(residual);  y = max(y, low);  y = min(y, high)
                       (the activation perhaps behind the residual)
                       (the activation perhaps behind the residual, which may be codes: (q - zero) * residual_step)
    stream: y is rounded to the stream type, and from here on y is the STORED value
    consumer: u = fma(y, G[c], H[c]);  u = max(u, 0);  t = u * scale;  t = t + n / 2 (signed)
              q = clamp(rint(t) + zero, 0, n);  y = (q - zero) * step (where there is a step)

`max` and `min` are those of IEEE maxNum: a NaN loses against the bound, so a NaN input becomes the lowest code.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program.activations import activate, at_least, at_most
from lbs_kernels.program.steps import STREAM_DTYPES, Activation, Consumer, Emit, Program

THRESHOLD_BITS = 4
# Accumulators lie in [-ACC_LIMIT, ACC_LIMIT] (the guard K * n_w * n_x < 2^31); one beyond stands for "never".
ACC_LIMIT = 2**31 - 2
_CACHED = 1 << 16  # elements worked on at once: 512 KB of float64


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Fused multiply-add of float32 tensors, rounded once: float32(a * b + c).

    The product of two float32 numbers is exact in float64; the sum is rounded there, and again to float32. That spoils
    the result only where the first rounding made a tie of the second one: then the last 28 bits of the float64 are 0.
    Sums that end so are rounded to odd instead.

    Args:
        a, b, c: float32, broadcastable against each other.

    Returns:
        float32 of the broadcast shape.
    """
    a, b, c = torch.broadcast_tensors(a, b, c)
    if a.device.type != "cpu":  # looking for ties would wait for the device
        return _odd_fma(a, b, c)
    total = torch.addcmul(c.double(), a.double(), b.double())
    result = total.float()
    perhaps = total.view(torch.int64) << 36 == 0
    if bool(perhaps.any()):
        result[perhaps] = _odd_fma(a[perhaps], b[perhaps], c[perhaps])
    return result


def fma_channels(x: Tensor, multiplier: Tensor, bias: Tensor, bound: int | None = None) -> Tensor:
    """y = fma(float32(x), M[c], B[c]) of a large batch, in the memory format of x: `fma32` on parts that stay in cache.

    Of integers the sums are exact in float64 unless M and B lie far apart; then one conversion rounds once, and three
    passes do instead of eight.

    Args:
        x: [N, ...] float32 or float64. multiplier, bias: float32, broadcastable against x.
        bound: x holds integers of at most this magnitude; None: any float32 numbers.
    """
    if x.device.type != "cpu" or x.dim() <= multiplier.dim():  # the latter: no batch to split
        return fma32(x.float(), multiplier, bias)
    exact = bound is not None and _sums_are_exact(bound, multiplier, bias)
    gain, shift = multiplier.double(), bias.double()
    result = torch.empty_like(x, dtype=torch.float32)
    rows = max(1, _CACHED * len(x) // max(x.numel(), 1))
    for source, target in zip(x.split(rows), result.split(rows), strict=True):
        part = source.float()
        target.copy_(part.double().mul_(gain).add_(shift) if exact else fma32(part, multiplier, bias))
    return result


def _sums_are_exact(bound: int, multiplier: Tensor, bias: Tensor) -> bool:
    """Whether every acc * M + B, |acc| <= bound, is a float64: a multiple of the last bit of M and of B, below 2^53
    of it.
    """
    m, b = (torch.frexp(part)[1].double() for part in (multiplier, bias))  # |M| < 2^m, a multiple of 2^(m - 24)
    last = torch.minimum(m, b) - 24
    fits = 2.0 * bound * torch.exp2(m) + torch.exp2(b) <= torch.exp2(last + 53)  # 2: float32(acc) may be above bound
    return bool((fits | (multiplier == 0) | (bias == 0)).all())


def _odd_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`fma32`, every sum rounded to odd in float64: the nearest one, moved one step toward the exact value where its
    last bit is even. That makes the second rounding equal to a single one: float64 has more than two bits to spare.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # two_sum: total + error is the exact sum.
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    bits = total.view(torch.int64)
    inexact = (error != 0) & torch.isfinite(total) & torch.isfinite(error) & ((bits & 1) == 0)
    # Larger magnitude is +1 on the bit pattern whatever the sign.
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()


def encode_reference(u: Tensor, consumer: Consumer) -> Tensor:
    """Codes of float values: q = clamp(rint(t) + zero, 0, n), t = u * scale (+ n / 2 if signed), rint half to even.

    Args:
        u: float32, any shape, after `pre_scale` and `relu`.
        consumer: bits, scale, zero and sign of the target.

    Returns:
        uint8 of the same shape. A NaN gives code 0, infinities saturate.
    """
    levels = (1 << consumer.bits) - 1
    t = u * torch.tensor(consumer.scale, dtype=torch.float32, device=u.device)
    if consumer.signed:
        t = t + levels / 2
    return at_most(at_least(t.round() + consumer.zero, 0.0), float(levels)).to(torch.uint8)


def decode_reference(codes: Tensor, zero: int, step: float) -> Tensor:
    """float32((q - zero) * step), one rounding, of codes uint8 of any shape."""
    return (codes.float() - zero) * torch.tensor(step, dtype=torch.float32, device=codes.device)


def consume_reference(y: Tensor, consumer: Consumer, program: Program, blob: Tensor) -> Tensor:
    """Step 6 for one consumer: codes uint8 [..., C] of stored values y [..., C] (any float dtype)."""
    u = y.float()
    if consumer.pre_scale is not None and consumer.pre_bias is not None:
        u = fma32(u, program.array(blob, consumer.pre_scale), program.array(blob, consumer.pre_bias))
    if consumer.relu:
        u = at_least(u, 0.0)
    return encode_reference(u, consumer)


def emit_reference(y: Tensor, emit: Emit, program: Program, blob: Tensor, tensors: MutableMapping[int, Tensor]) -> None:
    """Steps 3-6: write the stream and the codes that become of y.

    Args:
        y: float32 [N, H, W, C].
        emit: what to write.
        program, blob: source of the stream type and of pre-norm arrays; the blob lies on y's device.
        tensors: by index; gate and residual are read here (stream dtype [N, 1, 1, C] and [N, H, W, C], a residual also
            as uint8 codes), the targets are stored here: the stream in the stream dtype, codes as uint8, both
            [N, H, W, C].
    """
    activation = emit.activation
    if activation is not None and activation.first:
        y = _activated(y, activation, program, blob)
    if emit.gate is not None:
        y = y * tensors[emit.gate].float()
    if emit.residual is not None and emit.residual_step is not None:
        y = y + decode_reference(tensors[emit.residual], program.tensors[emit.residual].zero, emit.residual_step)
    elif emit.residual is not None:
        y = y + tensors[emit.residual].float()
    if activation is not None and not activation.first:
        y = _activated(y, activation, program, blob)
    y = _clamp(y, emit)
    if emit.stream is not None:
        stored = y.to(STREAM_DTYPES[program.stream_dtype])
        tensors[emit.stream] = stored
        y = stored.float()
    for consumer in emit.consumers:
        codes = consume_reference(y, consumer, program, blob)
        tensors[consumer.tensor] = codes
        if consumer.step is not None:
            y = decode_reference(codes, consumer.zero, consumer.step)


def thresholds(
    multiplier: Tensor, bias: Tensor, emit: Emit, consumer: Consumer, program: Program, blob: Tensor
) -> tuple[Tensor, Tensor]:
    """Integer thresholds that replace steps 1-6 for one consumer of at most 4 bits.

        q[o] = sum over k of (acc >= T[o, k])      where not flip[o]
        q[o] = sum over k of (acc <= T[o, k])      where flip[o]  (M < 0, or G < 0, but not both)

    Every step of the epilogue is monotone in acc, so each level k = 1 .. n starts at one integer, found by bisection
    with the reference itself: same codes, no float at run time.

    Args:
        multiplier, bias: float32 [O].
        emit: of the step; no gate or residual (they differ per element) and no activation (its float32 need not be
            monotone to the last bit). Clamp and stream rounding are honoured.
        consumer: one of emit's consumers, bits <= 4.
        program, blob: source of the stream type and of pre-norm arrays.

    Returns:
        (T int32 [O, n], flip bool [O]).

    Raises:
        FormatError: more than 4 bits, or an activation, a gate or a residual.
    """
    if consumer.bits > THRESHOLD_BITS:
        raise FormatError(f"consumer has {consumer.bits} bits; thresholds serve up to {THRESHOLD_BITS}, use the floats")
    if (emit.activation, emit.gate, emit.residual) != (None, None, None):
        raise FormatError(
            "emit has an activation, a gate or a residual; thresholds are for a monotone function of the accumulator, "
            "use the floats"
        )
    levels = (1 << consumer.bits) - 1
    filters = multiplier.shape[0]

    def codes_at(acc: Tensor) -> Tensor:  # int64 [O, n] -> uint8 [O, n]
        y = _clamp(fma32(acc.float().T, multiplier, bias), emit)
        if emit.stream is not None:
            y = y.to(STREAM_DTYPES[program.stream_dtype])
        return consume_reference(y, consumer, program, blob).T

    end = torch.full((filters, levels), ACC_LIMIT, dtype=torch.int64, device=multiplier.device)
    level = torch.arange(1, levels + 1, device=multiplier.device).expand(filters, levels)
    flip = codes_at(-end)[:, 0] > codes_at(end)[:, 0]
    sign = torch.where(flip, -1, 1).unsqueeze(1)
    # Along x = sign * acc the code never falls. Invariant: code(low) < level <= code(high), where the two ends may be
    # the sentinels beyond the limit.
    low, high = -end - 1, end + 1
    while bool((high - low > 1).any()):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        reached = codes_at(sign * middle) >= level
        high = torch.where(reached & (high - low > 1), middle, high)
        low = torch.where(~reached & (high - low > 1), middle, low)
    return (sign * high).to(torch.int32), flip


def _activated(y: Tensor, activation: Activation, program: Program, blob: Tensor) -> Tensor:
    slope = None if activation.slope is None else program.array(blob, activation.slope)
    return activate(y, activation.kind, activation.value, slope)


def _clamp(y: Tensor, emit: Emit) -> Tensor:
    if emit.low is not None:
        y = at_least(y, emit.low)
    if emit.high is not None:
        y = at_most(y, emit.high)
    return y
