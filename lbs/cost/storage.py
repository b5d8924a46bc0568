"""Bytes of weights and activations, packed and in floating point."""

from __future__ import annotations

from lbs_kernels.program.planes import WORD, words
from lbs_kernels.program.problem import TRANSPOSED, Problem
from lbs_kernels.program.transposed import phases

_WORD_BYTES = WORD // 8
_FLOAT_BYTES = 4


def weight_bytes(problem: Problem) -> int:
    """Bytes of a packed layer: planes int32 [w_bits, O, T, CW] and two float32 [O], multiplier and bias.

    >>> from lbs_kernels.program.problem import Problem
    >>> weight_bytes(Problem("bitlinear", 1, 1, 1, in_channels=40, out_channels=10, w_bits=2))
    240

    A transposed convolution has filters of their own for every phase of its outputs; one that no tap meets reads one.
    """
    counts = [problem.window.taps]
    if problem.op == TRANSPOSED:
        found = phases(problem.kernel, problem.stride, problem.dilation)
        counts = [max(1, rows.count * columns.count) for rows, columns in found]
    per_tap = words(problem.in_channels // problem.groups) * _WORD_BYTES
    planes = problem.w_bits * problem.out_channels * sum(counts) * per_tap
    return planes + 2 * _FLOAT_BYTES * problem.out_channels * len(counts)


def float_weight_bytes(problem: Problem) -> int:
    """Bytes of the layer's weights in float32, without bias and norm."""
    return _FLOAT_BYTES * problem.out_channels * problem.window.taps * (problem.in_channels // problem.groups)


def activation_bytes(problem: Problem) -> int:
    """Bytes of the layer's input as planes int32 [N, H, W, a_bits, CW]."""
    pixels = problem.batch * problem.height * problem.width
    return pixels * problem.a_bits * words(problem.in_channels) * _WORD_BYTES
