"""The one home of codes: how a float becomes an integer, and how it comes back (method: LBS eq. 1-6).

Everything that trains, freezes, packs or verifies calls these functions, so that what is trained is what is packed.
They work in the dtype they are given: float32 while training, float64 while verifying.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from lbs_kernels.errors import PlanError

_ABOVE_ONE = "each width must be an integer multiple of the one before"


def levels(bits: int) -> int:
    """n = 2^bits - 1, the largest code; an int64 scalar where a width is decided on the device."""
    return (1 << bits) - 1


def check_chain(bits: Sequence[int]) -> tuple[int, ...]:
    """Return the chain as a tuple if bit sharing is exact on it (LBS eq. 8-12).

    >>> check_chain((2, 4, 8))
    (2, 4, 8)

    Raises:
        PlanError: no whole numbers, empty, out of 1..8, or a width that is no integer multiple of the one before.
    """
    if not isinstance(bits, Sequence) or not all(isinstance(b, Integral) for b in bits):
        raise PlanError(f"bit chain {bits!r} is no list of whole numbers; give one such as (2, 4, 8)")
    chain = tuple(int(b) for b in bits)
    if not chain:
        raise PlanError("bit chain () is empty; name at least one width, for example (2, 4, 8)")
    for width in chain:
        if not 1 <= width <= 8:
            raise PlanError(f"bit chain {chain}: {width} bits are outside 1..8; use widths such as (2, 4, 8)")
    for narrow, wide in pairwise(chain):
        if wide <= narrow or wide % narrow:
            raise PlanError(
                f"bit chain {chain}: {wide} is no larger integer multiple of {narrow}; {_ABOVE_ONE}, "
                "for example (2, 4, 8), or else the shared levels do not nest"
            )
    return chain


def wide(x: Tensor) -> Tensor:
    """x itself if float32 or float64, else float32: codes of half-precision tensors are computed in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def activation_scale(v: Tensor, bits: int, signed: bool = False) -> Tensor:
    """n / v, or n / (2 v) for signed activations: what a float is multiplied by to reach code units.

    One rounding, in v's dtype. A number divided by a tensor would take two: torch multiplies by the reciprocal.
    """
    return _count(v, bits) / (2 * v if signed else v)


def code_step(v: Tensor, bits: int) -> Tensor:
    """v / n, the real value of one code unit, as exactly: a GPU would multiply by the reciprocal of a Python number."""
    return v / _count(v, bits)


def _count(v: Tensor, bits: int) -> Tensor:
    """n as a scalar in v's dtype, on its device."""
    n = levels(bits)
    return n.to(v.dtype) if isinstance(n, Tensor) else torch.full_like(v, n)


def activation_codes(x: Tensor, v: Tensor, bits: int, signed: bool = False) -> Tensor:
    """Codes 0..n of activations, in x's dtype (LBS eq. 1, 5; half to even).

        unsigned   q = clamp(rint(x * (n / v)), 0, n)
        signed     q = clamp(rint(x * (n / (2 v)) + n / 2), 0, n)

    Arguments:
        x: any shape, floating. v: positive scalar tensor, the clipping range.
    """
    t = x * activation_scale(v, bits, signed)
    n = levels(bits)
    if signed:
        t = t + n / 2
    t = t.round()
    return t.clamp(min=0).minimum(n.to(t.dtype)) if isinstance(n, Tensor) else t.clamp(0, n)


def activation_values(codes: Tensor, v: Tensor, bits: int, signed: bool = False) -> Tensor:
    """Real values of activation codes: v * q / n, signed v * (2 q - n) / n."""
    return (2 * codes - levels(bits) if signed else codes) * code_step(v, bits)


def weight_codes(w: Tensor, v: Tensor, bits: int) -> Tensor:
    """Codes 0..n of standardised weights, in w's dtype: rint(n * (clip(w / v, -1, 1) + 1) / 2) (LBS eq. 2, 6)."""
    n = levels(bits)
    return ((w / v).clamp(-1, 1) * (n / 2) + n / 2).round()


def weight_values(codes: Tensor, v: Tensor, bits: int) -> Tensor:
    """Real values of weight codes: v * (2 q - n) / n. There is no zero level."""
    return (2 * codes - levels(bits)) * code_step(v, bits)


def round_trip(x: Tensor, v: Tensor, bits: int, kind: str) -> Tensor:
    """decode(encode(x)) for kind `unsigned`, `signed` (activations) or `weight`."""
    if kind == "weight":
        return weight_values(weight_codes(x, v, bits), v, bits)
    signed = kind == "signed"
    return activation_values(activation_codes(x, v, bits, signed), v, bits, signed)


def input_codes(x: Tensor, step: Tensor, zero: Tensor | int) -> Tensor:
    """Codes 0..255 of the network input: clamp(rint(x / step) + zero, 0, 255), 1 / step rounded to x's dtype."""
    return ((x * (1.0 / step)).round() + zero).clamp(0, 255)


def input_values(codes: Tensor, step: Tensor, zero: Tensor | int) -> Tensor:
    """Real values of input codes: step * (q - zero)."""
    return (codes - zero) * step


def standardize(w: Tensor, mode: str, kept: Tensor | None = None) -> Tensor:
    """Divide weights by their standard deviation over the kept entries (detached), `full` also subtracts the mean.

    Arguments:
        w: weights of one layer. mode: `scale`, `full` or `none`. kept: 1 for entries that live, broadcastable to w.
    """
    if mode == "none":
        return w
    with torch.no_grad():
        mean, std = weight_statistics(w, kept)
    return (w - mean) / std if mode == "full" else w / std


def weight_statistics(w: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (biased) of the kept entries of w, as scalars in w's dtype.

    Sums run in float64, so that neither the threads, nor the instruction set, nor whether dead filters are masked or
    cut decide a code. Entries that are all equal (a single weight, say) have deviation 1: they stay as they are.
    """
    values = w.double()
    if kept is None:
        mean, variance = values.mean(), values.var(unbiased=False)
    else:
        mask = kept.expand_as(w)
        count = mask.sum(dtype=torch.float64)
        mean = (values * mask).sum() / count
        variance = ((values - mean) ** 2 * mask).sum() / count
    std = variance.sqrt().to(w.dtype)
    return mean.to(w.dtype), torch.where(std > 0, std, torch.ones_like(std))
