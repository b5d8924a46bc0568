"""Bit operations: one formula per kind of layer, in plain integers.

    BOPs(layer) = k_h * k_w * C_in * (C_out / groups) * H_out * W_out * b_w * b_a       (arXiv 2101.04935, section 3.3)

A transposed convolution multiplies every input pixel by every tap: H_in * W_in stand for H_out * W_out.

Norms, activations and pooling count nothing; full precision is 32 x 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from lbs_kernels.errors import LbsError
from lbs_kernels.program.planes import WORD, words
from lbs_kernels.program.problem import TRANSPOSED, Problem

FULL_PRECISION_BITS = 32


def _window_positions(problem: Problem) -> int:
    """Taps times output pixels: what one pair of an input and an output channel costs in a convolution."""
    return problem.rows * problem.window.taps


def _input_positions(problem: Problem) -> int:
    """Taps times input pixels: the same of a transposed convolution."""
    return problem.batch * problem.height * problem.width * problem.window.taps


def _row_positions(problem: Problem) -> int:
    """Positions a linear layer is applied at (`batch` of its problem)."""
    return problem.batch


# Kind of layer -> multiply-accumulates of ONE pair of an input and an output channel, before division by the groups.
PAIR_MACS: dict[str, Callable[[Problem], int]] = {
    "bitconv2d": _window_positions,
    "bitlinear": _row_positions,
    TRANSPOSED: _input_positions,
}


def pair_macs(problem: Problem) -> int:
    """Multiply-accumulates of one (input channel, output channel) pair, so that MACs = pair * C_in * C_out / groups.

    This factor stays a constant while a search varies channels and bits; multiply it by differentiable counts there.
    Raises LbsError for a kind of layer that has no formula.
    """
    if problem.op not in PAIR_MACS:
        raise LbsError(f"no cost formula for {problem.op!r}; known are {', '.join(PAIR_MACS)}: add one to PAIR_MACS")
    return PAIR_MACS[problem.op](problem)


def macs(problem: Problem) -> int:
    """Multiply-accumulates of the layer as it stands."""
    return pair_macs(problem) * problem.in_channels * problem.out_channels // problem.groups


def bops(problem: Problem) -> int:
    """Bit operations of the layer as it stands (logical: kept channels, nothing padded).

    >>> from lbs_kernels.program.problem import Problem
    >>> bops(Problem("bitlinear", 1, 1, 1, in_channels=64, out_channels=100, w_bits=4, a_bits=2))
    51200
    """
    return macs(problem) * problem.w_bits * problem.a_bits


def physical(problem: Problem) -> Problem:
    """The problem a bit-plane kernel executes: the input channels of each group filled up to whole 32-bit words.

    Filters are rows of their own and are not padded.

    >>> from lbs_kernels.program.problem import Problem
    >>> physical(Problem("bitconv2d", 1, 8, 8, in_channels=20, out_channels=12, kernel=(3, 3))).in_channels
    32
    """
    per_group = problem.in_channels // problem.groups
    return replace(problem, in_channels=words(per_group) * WORD * problem.groups)


def physical_bops(problem: Problem) -> int:
    """Bit operations a bit-plane kernel executes, unused bits of the last word included."""
    return bops(physical(problem))


def full_precision(problem: Problem) -> Problem:
    """The same layer at 32 x 32 bits."""
    return replace(problem, w_bits=FULL_PRECISION_BITS, a_bits=FULL_PRECISION_BITS)


def total_bops(problems: Iterable[Problem]) -> int:
    """Sum of the logical bit operations."""
    return sum(bops(problem) for problem in problems)
