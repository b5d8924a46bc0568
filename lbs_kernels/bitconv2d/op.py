"""`lbs_kernels::bitconv2d`: checks and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbs_kernels import library
from lbs_kernels.bitconv2d import reference
from lbs_kernels.errors import ShapeError
from lbs_kernels.one_step import OneStep, code_image
from lbs_kernels.program.epilogue import fma32
from lbs_kernels.program.planes import check_accumulator
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Emit
from lbs_kernels.run import backends

# Defaults live in the Python function alone: the dispatcher drops arguments that equal a default of the schema.
SCHEMA = (
    "bitconv2d(Tensor x_codes, Tensor w_planes, Tensor multiplier, Tensor bias, int a_bits, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, int zero, bool signed, str backend) -> Tensor"
)


def bitconv2d(
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    *,
    a_bits: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero: int = 0,
    signed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolution of codes: y = fma(float32(acc), multiplier[o], bias[o]), acc as in `reference.py`.

    Args:
        x_codes: uint8 [N, H, W, C], values below 2^a_bits (checked on the CPU only).
        w_planes: int32 [w_bits, O, kh * kw, CW] of `pack_weights`, CW over the C / groups channels of one group.
        multiplier, bias: float32 [O].
        zero: the code of real 0, which padding holds. signed: codes mean 2 q - n; they cannot be padded.
        backend: "auto", "reference", "cpu", "gpu" or "triton".

    Returns:
        float32 [N, H', W', O].

    Raises:
        ShapeError: tensors that do not fit each other. FormatError: codes or bits beyond the format, or an
            accumulator that could overflow. BackendError: the back end named cannot serve.

    >>> from lbs_kernels.program.planes import pack_weights
    >>> planes = pack_weights(torch.ones(1, 1, 1, 2, dtype=torch.uint8), bits=1)  # both weights are 2 * 1 - 1 = 1
    >>> x = torch.tensor([3, 4], dtype=torch.uint8).reshape(1, 1, 1, 2)
    >>> bitconv2d(x, planes, torch.ones(1), torch.zeros(1), a_bits=4, kernel=(1, 1)).item()
    7.0
    """
    result: Tensor = torch.ops.lbs_kernels.bitconv2d(
        x_codes, w_planes, multiplier, bias, a_bits, kernel, stride, padding, dilation, groups, zero, signed, backend
    )
    return result


def _problem(
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    a_bits: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: int,
    signed: bool,
) -> Problem:
    """The checked problem; sizes may be symbolic."""
    library.check_codes("bitconv2d", x_codes, "N H W C", a_bits, zero, signed)
    batch, height, width, channels = x_codes.shape
    if groups < 1 or channels % groups or w_planes.dim() != 4 or w_planes.shape[1] % groups:
        raise ShapeError(
            f"bitconv2d: {groups} groups of {channels} channels and planes {list(w_planes.shape)}; groups divide the "
            "channels and the filters"
        )
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise ShapeError(
            f"bitconv2d: kernel {kernel}, stride {stride}, dilation {dilation}, padding {padding}; at least 1, 1, 1, 0"
        )
    if signed and max(padding) > 0:
        raise ShapeError(f"bitconv2d: padding {padding} of signed codes, which have no code for 0; pad before encoding")
    taps = kernel[0] * kernel[1]
    library.check_weights("bitconv2d", x_codes, w_planes, multiplier, bias, channels // groups, taps)
    check_accumulator(taps * (channels // groups), w_planes.shape[0], a_bits, "bitconv2d")
    problem = Problem(
        "bitconv2d",
        batch,
        height,
        width,
        channels,
        w_planes.shape[1],
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        groups,
        w_planes.shape[0],
        a_bits,
        x_codes.device.type,
    )
    if problem.out_height < 1 or problem.out_width < 1:
        raise ShapeError(
            f"bitconv2d: a kernel of {kernel}, dilation {dilation}, does not fit {height} x {width} pixels, "
            f"padding {padding}"
        )
    return problem


def _implementation(
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    a_bits: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: int,
    signed: bool,
    backend: str,
) -> Tensor:
    problem = _problem(
        x_codes, w_planes, multiplier, bias, a_bits, kernel, stride, padding, dilation, groups, zero, signed
    )
    library.check_code_range("bitconv2d", x_codes, a_bits)
    chosen = backends.choose(problem, backend)
    if problem.batch == 0:
        return _empty(x_codes, problem)
    if chosen != "reference":
        return _one_step(problem, x_codes, w_planes, multiplier, bias, zero, signed, chosen)
    acc = reference.accumulate(
        x_codes,
        w_planes,
        a_bits=a_bits,
        kernel=problem.kernel,
        stride=problem.stride,
        padding=problem.padding,
        dilation=problem.dilation,
        groups=groups,
        zero=zero,
        signed=signed,
    )
    return fma32(acc.float(), multiplier, bias).contiguous()


def _one_step(
    problem: Problem,
    x_codes: Tensor,
    w_planes: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    zero: int,
    signed: bool,
    backend: str,
) -> Tensor:
    region = OneStep()
    size = (problem.height, problem.width, problem.in_channels)
    codes = region.code_input(size, problem.a_bits, zero, signed)
    emit = Emit(stream=region.stream("y", (problem.out_height, problem.out_width, problem.out_channels)))
    geometry = (problem.kernel, problem.stride, problem.padding, problem.dilation, problem.groups)
    step = ConvStep("bitconv2d", codes, emit, problem.w_bits, *geometry, problem.out_channels, "planes", "m", "b")
    region.steps.append(step)
    arrays = {"planes": w_planes, "m": multiplier, "b": bias}
    y = region.run(code_image(x_codes, problem.a_bits, zero, signed), arrays, backend)[0]
    return y.permute(0, 2, 3, 1).contiguous()


def _empty(x_codes: Tensor, problem: Problem) -> Tensor:
    shape = (x_codes.shape[0], problem.out_height, problem.out_width, problem.out_channels)
    return x_codes.new_empty(shape, dtype=torch.float32)


def _fake(x_codes: Tensor, *arguments: Any) -> Tensor:
    return _empty(x_codes, _problem(x_codes, *arguments[:-1]))


library.define(SCHEMA, _implementation, _fake)
