"""Transposed convolutions as ordinary ones: outputs a stride apart are one convolution of the input.

Along one side, with stride s, dilation d and K taps, output o (the padding cropped: u = o + p) is

    y[u] = sum_k w[k] * x[(u - k d) / s]        over the k for which this is a whole number

so that outputs of one remainder u % s see the same taps first, first + step, ..., and see them as a convolution with
stride 1 does. Outputs whose remainder no tap meets are the bias alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Phase:
    """The taps that outputs of one remainder see along one side, as a convolution of `count` taps, `dilation` apart.

    y[u] = sum_j w[first + j * step] * x[m - j * dilation],   m = (u - first * d) / s
    """

    first: int
    step: int
    count: int
    dilation: int

    @property
    def taps(self) -> slice:
        """In the order of a convolution, which looks ahead: the last tap first (of what is flipped before)."""
        return slice(self.first, self.first + self.count * self.step, self.step)


def phase(remainder: int, kernel: int, stride: int, dilation: int) -> Phase:
    """The phase of outputs u with u % stride == remainder.

    >>> [phase(r, 3, 2, 1).count for r in (0, 1)], [phase(r, 4, 2, 1).count for r in (0, 1)], phase(1, 3, 2, 2).count
    ([2, 1], [2, 2], 0)
    """
    common = math.gcd(stride, dilation)
    step = stride // common
    first = next((k for k in range(min(step, kernel)) if k * dilation % stride == remainder), None)
    count = 0 if first is None else -(-(kernel - first) // step)
    return Phase(first or 0, step, count, dilation // common)


def phases(kernel: Pair, stride: Pair, dilation: Pair) -> Iterator[tuple[Phase, Phase]]:
    """(rows, columns) of every phase, by the remainders of rows and columns."""
    sides = [[phase(r, k, s, d) for r in range(s)] for k, s, d in zip(kernel, stride, dilation, strict=True)]
    return ((rows, columns) for rows in sides[0] for columns in sides[1])
