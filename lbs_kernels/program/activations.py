"""Activations: one float32 formula each, which every back end computes to the same bits.

    k = rint(h * LOG2_E)                         exp(h + l) = s + s * p,   expm1(h) = (s - 1) + s * p,   |h| <= 80
    r = ((h - k * LN2_HIGH) - k * LN2_LOW) + l
    p = (r * r) * (E0 + r * (E1 + r * (E2 + r * (E3 + r * E4)))) + r
    s = the float of bits (k + 127) << 23, which is 2^k

Additions, subtractions, multiplications and divisions, each rounded to float32; `max` and `min` are those of IEEE
maxNum, so that a NaN takes the bound and nothing here gives one. LN2_HIGH has 9 bits, so that k * LN2_HIGH is exact and
what is left of h too. docs/format.md says how far each function is from the true one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -0.000212194442
SIXTH = 0.166666672
# expm1(r) - r = r^2 * E(r) for |r| <= 0.3475, minimax in the error relative to r.
EXP = (0.5, 0.166665435, 0.0416662879, 0.00836651865, 0.00139463006)
# The upper tail of the normal distribution times exp(a^2 / 2) is t * T(t), t = 1 / (1 + a / 4), for 0 <= a <= 12.75:
# minimax in the relative error, 1.2e-1 units of 2^-24.
TAIL = (
    0.0997532234,
    0.0993970037,
    0.0962540731,
    0.0687736273,
    0.0954482481,
    -0.00280956761,
    0.0462159291,
    0.0388888195,
    -0.0575736649,
    0.0156523045,
)
SLOPES = {  # the largest |derivative|, rounded up; by the size of the value for elu, leaky_relu and prelu
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "hardsigmoid": 0.17,
    "hardswish": 1.5,
    "mish": 1.09,
    "sigmoid": 0.25,
    "silu": 1.1,
    "tanh": 1.0,
}
_CACHED = 1 << 15  # elements worked on at once: 128 KB for each intermediate


def activate(y: Tensor, kind: str, value: float = 0.0, slope: Tensor | None = None) -> Tensor:
    """An activation of every element.

    Args:
        y: float32, any shape; of prelu, with channels where `slope` has them.
        kind: one of `KINDS`. value: alpha of elu, slope of leaky_relu, exact in float32.
        slope: float32, broadcastable to y: the slopes of prelu.

    Returns:
        float32 of the shape and memory format of y.
    """
    factor = slope if slope is not None else _number(y, value)
    formula = _FORMULAS[kind]
    if y.device.type != "cpu" or y.dim() == 0 or y.numel() <= _CACHED or (slope is not None and slope.dim() >= y.dim()):
        return formula(y, factor)
    result = torch.empty_like(y)
    rows = max(1, _CACHED * len(y) // y.numel())
    for source, target in zip(y.split(rows), result.split(rows), strict=True):
        target.copy_(formula(source, factor))
    return result


def at_least(y: Tensor, low: float) -> Tensor:
    """max(y, low), IEEE maxNum."""
    return torch.fmax(y, _number(y, low))


def at_most(y: Tensor, high: float) -> Tensor:
    """min(y, high), IEEE minNum."""
    return torch.fmin(y, _number(y, high))


def _number(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """c[0] + x * (c[1] + x * (...))."""
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * x + coefficient
    return result


def _power(h: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(s, p) of h, or of h + low."""
    k = ((h if low is None else h + low) * LOG2_E).round()
    r = (h - k * LN2_HIGH) - k * LN2_LOW
    if low is not None:
        r = r + low
    p = (r * r) * _polynomial(EXP, r) + r
    return ((k.to(torch.int32) + 127) << 23).view(torch.float32), p


def _exp(h: Tensor, low: Tensor | None = None) -> Tensor:
    s, p = _power(h, low)
    return s * p + s


def _expm1(h: Tensor) -> Tensor:
    s, p = _power(h)
    return s * p + (s - 1)


def _bounded(x: Tensor, limit: float) -> Tensor:
    return at_most(at_least(x, -limit), limit)


def _elu(x: Tensor, alpha: Tensor) -> Tensor:
    return at_least(x, 0.0) + alpha * _expm1(at_least(at_most(x, 0.0), -20.0))


def _gelu(x: Tensor, factor: Tensor) -> Tensor:
    a = at_most(torch.fmax(x, -x), 12.5)
    c = (a * 16).round() * 0.0625  # c^2 is exact, and a^2 = c^2 + (a - c) (a + c)
    tail = _exp((c * c) * -0.5, ((a - c) * (a + c)) * -0.5)
    t = (a * 0.25 + 1).reciprocal()
    return at_least(x, 0.0) - a * (tail * (t * _polynomial(TAIL, t)))


def _gelu_tanh(x: Tensor, factor: Tensor) -> Tensor:
    x = at_least(x, -9.5)
    c = at_most(x, 9.5)
    u = c * ((c * c) * 0.0713548163 + 1.59576912)
    return x / (_exp(-u) + 1)


def _hardsigmoid(x: Tensor, factor: Tensor) -> Tensor:
    return at_most(at_least(x + 3, 0.0), 6.0) * SIXTH


def _hardswish(x: Tensor, factor: Tensor) -> Tensor:
    x = at_least(x, -3.0)
    return x * (at_most(x + 3, 6.0) * SIXTH)


def _leaky_relu(x: Tensor, slope: Tensor) -> Tensor:
    return at_least(x, 0.0) + slope * at_least(at_most(x, 0.0), -torch.finfo(torch.float32).max)


def _mish(x: Tensor, factor: Tensor) -> Tensor:
    x = at_least(x, -80.0)
    e = _exp(at_most(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def _sigmoid(x: Tensor, factor: Tensor) -> Tensor:
    return (_exp(-_bounded(x, 80.0)) + 1).reciprocal()


def _silu(x: Tensor, factor: Tensor) -> Tensor:
    x = at_least(x, -80.0)
    return x / (_exp(-at_most(x, 80.0)) + 1)


def _tanh(x: Tensor, factor: Tensor) -> Tensor:
    x = _bounded(x, 10.0)
    e = _expm1(x + x)
    return e / (e + 2)


_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elu": _elu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "leaky_relu": _leaky_relu,
    "mish": _mish,
    "prelu": _leaky_relu,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "tanh": _tanh,
}
KINDS = tuple(_FORMULAS)
