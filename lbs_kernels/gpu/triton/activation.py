"""Activations of a tile: the formulas of program/activations.py, operation by operation."""

from __future__ import annotations

import triton
import triton.language as tl

from lbs_kernels.gpu.triton.common import RINT_MAGIC, RINT_MAGIC_BITS, at_least, at_most
from lbs_kernels.program import activations

LOG2_E = tl.constexpr(activations.LOG2_E)
LN2_HIGH, LN2_LOW = tl.constexpr(activations.LN2_HIGH), tl.constexpr(activations.LN2_LOW)
SIXTH = tl.constexpr(activations.SIXTH)
E0, E1, E2, E3, E4 = (tl.constexpr(c) for c in activations.EXP)
T0, T1, T2, T3, T4, T5, T6, T7, T8, T9 = (tl.constexpr(c) for c in activations.TAIL)


@triton.jit
def power(h, low):
    """2^k and p with exp(h + low) = 2^k (1 + p)."""
    shifted = (h + low) * LOG2_E + RINT_MAGIC
    k = shifted - RINT_MAGIC
    r = ((h - k * LN2_HIGH) - k * LN2_LOW) + low
    p = (r * r) * ((((r * E4 + E3) * r + E2) * r + E1) * r + E0) + r
    bits = (shifted.to(tl.int32, bitcast=True) - (RINT_MAGIC_BITS - 127)) << 23
    return bits.to(tl.float32, bitcast=True), p


@triton.jit
def exp(h, low):
    """exp(h + low)."""
    s, p = power(h, low)
    return s * p + s


@triton.jit
def expm1(h):
    """exp(h) - 1."""
    s, p = power(h, 0.0)
    return s * p + (s - 1.0)


@triton.jit
def quotient(a, b):
    """a / b, rounded correctly."""
    return tl.div_rn(a, b)


@triton.jit
def gelu(x):
    """x times the normal distribution up to x."""
    a = at_most(tl.maximum(x, -x), 12.5)
    c = ((a * 16.0 + RINT_MAGIC) - RINT_MAGIC) * 0.0625
    tail = exp((c * c) * -0.5, ((a - c) * (a + c)) * -0.5)
    t = quotient(tl.full(x.shape, 1.0, tl.float32), a * 0.25 + 1.0)
    series = ((((t * T9 + T8) * t + T7) * t + T6) * t + T5) * t + T4
    series = (((series * t + T3) * t + T2) * t + T1) * t + T0
    return at_least(x, 0.0) - a * (tail * (t * series))


@triton.jit
def activate(x, value, KIND: tl.constexpr):
    """The activation KIND of x; `value` is alpha of elu, the slope of leaky_relu, slopes of prelu."""
    if KIND == "elu":
        y = at_least(x, 0.0) + value * expm1(at_least(at_most(x, 0.0), -20.0))
    elif KIND == "gelu":
        y = gelu(x)
    elif KIND == "gelu_tanh":
        x = at_least(x, -9.5)
        c = at_most(x, 9.5)
        y = quotient(x, exp(-(c * ((c * c) * 0.0713548163 + 1.59576912)), 0.0) + 1.0)
    elif KIND == "hardsigmoid":
        y = at_most(at_least(x + 3.0, 0.0), 6.0) * SIXTH
    elif KIND == "hardswish":
        x = at_least(x, -3.0)
        y = x * (at_most(x + 3.0, 6.0) * SIXTH)
    elif KIND == "leaky_relu" or KIND == "prelu":
        y = at_least(x, 0.0) + value * at_least(at_most(x, 0.0), -3.4028234663852886e38)
    elif KIND == "mish":
        x = at_least(x, -80.0)
        e = exp(at_most(x, 20.0), 0.0)
        n = e * (e + 2.0)
        y = x * quotient(n, n + 2.0)
    elif KIND == "sigmoid":
        h = at_most(at_least(x, -80.0), 80.0)
        y = quotient(tl.full(x.shape, 1.0, tl.float32), exp(-h, 0.0) + 1.0)
    elif KIND == "silu":
        x = at_least(x, -80.0)
        y = quotient(x, exp(-at_most(x, 80.0), 0.0) + 1.0)
    else:
        tl.static_assert(KIND == "tanh")
        c = at_most(at_least(x, -10.0), 10.0)
        e = expm1(c + c)
        y = quotient(e, e + 2.0)
    return y
