"""What `accumulate` of a back end is asked: codes and planes as a problem and its input."""

from __future__ import annotations

from torch import Tensor

from lbs_kernels.errors import ShapeError
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import TensorSpec


def posed(
    x_codes: Tensor,
    w_planes: Tensor,
    a_bits: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    zero: int,
    signed: bool,
) -> tuple[Problem, TensorSpec]:
    """The problem on the device of the codes, and how they are read; arguments as in reference.py, of one group.

    Raises:
        ShapeError: signed codes with padding.
    """
    check_padding(signed, padding)
    batch, height, width, channels = x_codes.shape
    w_bits, filters = w_planes.shape[:2]
    problem = Problem(
        "bitconv2d", batch, height, width, channels, filters, kernel, stride, padding, dilation, 1, w_bits, a_bits,
        str(x_codes.device),
    )  # fmt: skip
    return problem, TensorSpec("x", "codes", channels, height, width, a_bits, zero, signed)


def check_padding(signed: bool, padding: tuple[int, int]) -> None:
    """Raises ShapeError for signed codes with padding."""
    if signed and padding != (0, 0):
        raise ShapeError(f"padding {padding} of signed codes: they have no code for 0; pad before encoding")
