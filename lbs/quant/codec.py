"""The one home of codes: how a float becomes an integer, and how it comes back (method: LBS eq. 1-6).

Everything that trains, freezes, packs or verifies calls these functions, so that what is trained is what is packed.
They work in the dtype they are given: float32 while training, float64 while verifying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from lbs_kernels.errors import PlanError
from lbs_kernels.program import planes

PART = 1 << 22  # weights worked on at once: 32 MB of float64
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


@dataclass(frozen=True)
class Coding:
    """How values become codes, whatever the width and the range v > 0.

    kind        codes                                               values
    unsigned    q = clamp(rint(x * n / v) + z, 0, n)                v * (q - z) / n
    signed      q = clamp(rint(x * n / (2 v) + n / 2), 0, n)        v * (2 q - n) / n                   no code is 0
    weight      q = rint(n * (clip(x / v, -1, 1) + 1) / 2)          v * (2 q - n) / n                   no code is 0
    zero        q = rint(m * clip(x / v, -1, 1)) + 2^(b-1)          v * (q - 2^(b-1)) / m,  m = 2^(b-1) - 1

    `unsigned` and `signed` are activations (LBS eq. 1, 5), `weight` and `zero` standardised weights on the odd grid
    (eq. 2, 6) and on the one with a zero. z is the code of real 0, `zero` of `levels` codes: a whole number at every
    width of a chain if it is one at the narrowest, whose n divides the others.
    """

    kind: str
    zero: int = 0
    levels: int = 1

    @property
    def is_weight(self) -> bool:
        return self.kind in ("weight", "zero")

    @property
    def plain(self) -> bool:
        """Whether a kernel that knows the odd grid and codes from 0 on serves it."""
        return self.kind != "zero" and not self.zero

    @property
    def shares(self) -> tuple[float, float]:
        """(low, high): values from -low * v to high * v are not clipped."""
        if self.kind != "unsigned":
            return 1.0, 1.0
        return self.zero / self.levels, (self.levels - self.zero) / self.levels

    def zero_at(self, bits: int) -> int:
        """The code of real 0 among codes of `bits` bits."""
        return self.zero * levels(bits) // self.levels


def around_zero(low: float, high: float, n: int) -> tuple[float, int]:
    """(width, code of 0) of the least range that covers [-low, high] with 0 among its n + 1 values, both at least 0."""
    zero = round(low / (low + high) * n) if low + high > 0 else 0
    return max(low * n / zero if zero else 0.0, high * n / (n - zero) if zero < n else 0.0), zero


def activation_codes(x: Tensor, v: Tensor, bits: int, coding: Coding) -> Tensor:
    """Codes 0..n of activations, in x's dtype, half to even; v: positive scalar."""
    signed, n = coding.kind == "signed", levels(bits)
    t = x * activation_scale(v, bits, signed)
    t = (t + n / 2).round() if signed else t.round()
    if coding.zero:
        t = t + coding.zero_at(bits)
    return t.clamp(min=0).minimum(n.to(t.dtype)) if isinstance(n, Tensor) else t.clamp(0, n)


def activation_values(codes: Tensor, v: Tensor, bits: int, coding: Coding) -> Tensor:
    """Real values of activation codes."""
    if coding.kind == "signed":
        return (2 * codes - levels(bits)) * code_step(v, bits)
    return (codes - coding.zero_at(bits) if coding.zero else codes) * code_step(v, bits)


def weight_codes(w: Tensor, v: Tensor, bits: int, grid: str = "odd") -> Tensor:
    """Codes 0..n of standardised weights, in w's dtype; v: positive, broadcastable to w."""
    unit = (w / v).clamp(-1, 1)
    if grid == "zero":
        return (unit * weight_top(bits, grid)).round() + (1 << (bits - 1))
    n = levels(bits)
    return (unit * (n / 2) + n / 2).round()


def weight_units(codes: Tensor, bits: int, grid: str = "odd", dtype: torch.dtype | None = None) -> Tensor:
    """What codes count as in the accumulator: 2 q - n, or q - 2^(bits - 1) on the grid with a zero.

    dtype: of the result, where it is not that of the codes.
    """
    scale, shift = planes.weight_units(bits, grid)
    if dtype is not None and dtype != codes.dtype:  # a copy, which is worked on: another one costs as much as it does
        units = codes.to(dtype)
        return (units if scale == 1 else units.mul_(scale)).add_(shift)
    return (codes if scale == 1 else scale * codes) + shift


def weight_top(bits: int, grid: str = "odd") -> int:
    """Units of the largest weight, v: n, or 2^(bits - 1) - 1."""
    return levels(bits - 1) if grid == "zero" else levels(bits)


def weight_values(codes: Tensor, v: Tensor, bits: int, grid: str = "odd") -> Tensor:
    """Real values of weight codes."""
    step = v / torch.full_like(v, weight_top(bits, grid)) if grid == "zero" else code_step(v, bits)
    return weight_units(codes, bits, grid) * step


def round_trip(x: Tensor, v: Tensor, bits: int, coding: Coding) -> Tensor:
    """decode(encode(x))."""
    if coding.is_weight:
        grid = "zero" if coding.kind == "zero" else "odd"
        return weight_values(weight_codes(x, v, bits, grid), v, bits, grid)
    return activation_values(activation_codes(x, v, bits, coding), v, bits, coding)


UNSIGNED, SIGNED = Coding("unsigned"), Coding("signed")
WEIGHTS = {"odd": Coding("weight"), "zero": Coding("zero")}  # by grid
CODINGS = {coding.kind: coding for coding in (UNSIGNED, SIGNED, *WEIGHTS.values())}


def input_codes(x: Tensor, step: Tensor, zero: Tensor | int) -> Tensor:
    """Codes 0..255 of the network input: clamp(rint(x / step) + zero, 0, 255), 1 / step rounded to x's dtype."""
    return ((x * (1.0 / step)).round() + zero).clamp(0, 255)


def input_values(codes: Tensor, step: Tensor, zero: Tensor | int) -> Tensor:
    """Real values of input codes: step * (q - zero)."""
    return (codes - zero) * step


def standardize(
    w: Tensor, mode: str, kept: Tensor | None = None, statistics: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Divide weights by their standard deviation over the kept entries (detached), `full` also subtracts the mean.

    Arguments:
        w: weights of one layer, or some of them. mode: `scale`, `full` or `none`. kept: 1 for entries that live,
            broadcastable to w. statistics: `weight_statistics` of the whole layer, where w is a part of it.
    """
    if mode == "none":
        return w
    with torch.no_grad():
        mean, std = statistics or weight_statistics(w, kept)
    return (w - mean) / std if mode == "full" else w / std


def weight_statistics(w: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (biased) of the kept entries of w, as scalars in w's dtype.

    Sums run in float64, so that neither the threads, nor the instruction set, nor whether dead filters are masked or
    cut decide a code. Entries that are all equal (a single weight, say) have deviation 1: they stay as they are.
    """
    if kept is None and w.numel() > PART:
        parts = w.split(part_rows(w))
        mean = sum(part.double().sum() for part in parts) / w.numel()
        variance = sum((part.double() - mean).square_().sum() for part in parts) / w.numel()
        return _as_deviation(mean, variance, w.dtype)
    values = w.double()
    if kept is None:
        mean, variance = values.mean(), values.var(unbiased=False)
    else:
        mask = kept.expand_as(w)
        count = mask.sum(dtype=torch.float64)
        mean = (values * mask).sum() / count
        variance = ((values - mean) ** 2 * mask).sum() / count
    return _as_deviation(mean, variance, w.dtype)


def _as_deviation(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    std = variance.sqrt().to(dtype)
    return mean.to(dtype), torch.where(std > 0, std, torch.ones_like(std))


def part_rows(w: Tensor) -> int:
    """Filters of w that are worked on at once, so that temporary float64 copies of large layers stay small."""
    return max(1, PART * len(w) // max(w.numel(), 1))
