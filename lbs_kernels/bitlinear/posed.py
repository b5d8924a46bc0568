"""What `accumulate` of a back end is asked: codes and planes as a problem and its input."""

from __future__ import annotations

from torch import Tensor

from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import TensorSpec


def posed(x_codes: Tensor, w_planes: Tensor, a_bits: int, zero: int, signed: bool) -> tuple[Problem, TensorSpec]:
    """The problem on the device of the codes, and how they are read; arguments as in reference.py."""
    batch, channels = x_codes.shape
    w_bits, filters = w_planes.shape[:2]
    problem = Problem(
        "bitlinear", batch, 1, 1, channels, filters, w_bits=w_bits, a_bits=a_bits, device=str(x_codes.device)
    )
    return problem, TensorSpec("x", "codes", channels, 1, 1, a_bits, zero, signed)
