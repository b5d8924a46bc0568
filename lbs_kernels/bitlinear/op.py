"""`lbs_kernels::bitlinear`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels import library
from lbs_kernels.bitlinear import reference
from lbs_kernels.one_step import OneStep, code_image
from lbs_kernels.program.epilogue import fma32
from lbs_kernels.program.planes import check_accumulator
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Emit, LinearStep
from lbs_kernels.run import backends

SCHEMA = (
    "bitlinear(Tensor x_codes, Tensor w_planes, Tensor multiplier, Tensor bias, int a_bits, int zero, bool signed, "
    "str backend) -> Tensor"
)


def bitlinear(
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    *,
    a_bits: int,
    zero: int = 0,
    signed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Matrix product of codes: y = fma(float32(acc), multiplier[o], bias[o]), acc as in `reference.py`.

    Args:
        x_codes: uint8 [N, C], values below 2^a_bits (checked on the CPU only).
        w_planes: int32 [w_bits, O, 1, CW] of `pack_weights`.
        multiplier, bias: float32 [O].
        zero, signed: how codes are read, see `bitconv2d`.
        backend: "auto", "reference", "cpu", "gpu" or "triton".

    Returns:
        float32 [N, O].

    Raises:
        ShapeError, FormatError, BackendError: as `bitconv2d`.

    >>> from lbs_kernels.program.planes import pack_weights
    >>> planes = pack_weights(torch.tensor([[3, 0]], dtype=torch.uint8).reshape(1, 1, 1, 2), bits=2)  # 3 and -3
    >>> x = torch.tensor([[5, 1]], dtype=torch.uint8)
    >>> bitlinear(x, planes, torch.ones(1), torch.zeros(1), a_bits=4)
    tensor([[12.]])
    """
    result: Tensor = torch.ops.lbs_kernels.bitlinear(x_codes, w_planes, multiplier, bias, a_bits, zero, signed, backend)
    return result


def _problem(
    x_codes: Tensor, w_planes: Tensor, multiplier: Tensor, bias: Tensor, a_bits: int, zero: int, signed: bool
) -> Problem:
    """The checked problem; the batch may be symbolic."""
    library.check_codes("bitlinear", x_codes, "N C", a_bits, zero, signed)
    batch, channels = x_codes.shape
    library.check_weights("bitlinear", x_codes, w_planes, multiplier, bias, channels, taps=1)
    w_bits, filters = w_planes.shape[:2]
    check_accumulator(channels, w_bits, a_bits, "bitlinear")
    device = x_codes.device.type
    return Problem("bitlinear", batch, 1, 1, channels, filters, w_bits=w_bits, a_bits=a_bits, device=device)


def _implementation(
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    a_bits: int,
    zero: int,
    signed: bool,
    backend: str,
) -> Tensor:
    problem = _problem(x_codes, w_planes, multiplier, bias, a_bits, zero, signed)
    library.check_code_range("bitlinear", x_codes, a_bits)
    chosen = backends.choose(problem, backend)
    if problem.batch == 0:
        return x_codes.new_empty((0, problem.out_channels), dtype=torch.float32)
    if chosen == "reference":
        acc = reference.accumulate(x_codes, w_planes, a_bits=a_bits, zero=zero, signed=signed)
        return fma32(acc.float(), multiplier, bias)
    region = OneStep()
    codes = region.code_input((1, 1, problem.in_channels), a_bits, zero, signed)
    emit = Emit(stream=region.stream("y", (1, 1, problem.out_channels)))
    region.steps.append(LinearStep("bitlinear", codes, emit, problem.w_bits, problem.out_channels, "planes", "m", "b"))
    image = code_image(x_codes[:, None, None], a_bits, zero, signed)
    return region.run(image, {"planes": w_planes, "m": multiplier, "b": bias}, chosen)[0].flatten(1)


def _fake(
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    a_bits: int,
    zero: int,
    signed: bool,
    backend: str,
) -> Tensor:
    problem = _problem(x_codes, w_planes, multiplier, bias, a_bits, zero, signed)
    return x_codes.new_empty((x_codes.shape[0], problem.out_channels), dtype=torch.float32)


library.define(SCHEMA, _implementation, _fake)
