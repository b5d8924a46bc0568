"""`lbs_kernels::quantpack`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels import library
from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.one_step import OneStep
from lbs_kernels.program.epilogue import encode_reference
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import IMAGE_DTYPES, Consumer, Emit, QuantPackStep
from lbs_kernels.program.walk import is_float32
from lbs_kernels.quantpack import reference
from lbs_kernels.run import backends

SCHEMA = (
    "quantpack(Tensor x, float scale, int bits, int zero, bool signed, Tensor? multiplier, Tensor? bias, "
    "str backend) -> Tensor"
)


def quantpack(
    x: Tensor,
    *,
    scale: float,
    bits: int,
    zero: int = 0,
    signed: bool = False,
    multiplier: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Codes of an image: q = clamp(rint(t) + zero, 0, n), t = float32(y * scale), plus n / 2 if signed; half to even.

    y = fma(float32(x), multiplier[c], bias[c]), or float32(x) without them. `pack_planes` makes planes of the codes.

    Args:
        x: float32 or uint8 [N, C, H, W]; channels first and channels last are read where they lie. NaN gives code 0.
        multiplier, bias: float32 [C] on x's device, both or none.
        scale: n / v, n / (2 v) if signed, or 1 / s; positive and exact in float32.
        bits: 1 .. 8. zero: the code of real 0. signed: codes mean v (2 q - n) / n.
        backend: "auto", "reference", "cpu", "gpu" or "triton".

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ShapeError, FormatError, BackendError: as `bitconv2d`.

    >>> quantpack(torch.tensor([-1.0, 0.5, 1.5, 9.0]).reshape(1, 1, 2, 2), scale=1.0, bits=2).flatten()
    tensor([0, 0, 2, 3], dtype=torch.uint8)
    """
    result: Tensor = torch.ops.lbs_kernels.quantpack(x, scale, bits, zero, signed, multiplier, bias, backend)
    return result


_DTYPES = {dtype: name for name, dtype in IMAGE_DTYPES.items()}


def _problem(
    x: Tensor, scale: float, bits: int, zero: int, signed: bool, multiplier: Tensor | None, bias: Tensor | None
) -> Problem:
    """The checked problem; sizes may be symbolic."""
    if x.dtype not in _DTYPES or x.dim() != 4:
        raise ShapeError(f"quantpack: x is {x.dtype} {list(x.shape)}; expected float32 or uint8 [N, C, H, W]")
    if (multiplier is None) != (bias is None):
        raise ShapeError("quantpack: only one of multiplier and bias is given; give both or none")
    for name, value in (("multiplier", multiplier), ("bias", bias)):
        if value is not None and (value.dtype is not torch.float32 or value.shape != x.shape[1:2]):
            raise ShapeError(f"quantpack: {name} is {value.dtype} {list(value.shape)}; expected float32 [{x.shape[1]}]")
        if value is not None and value.device != x.device:
            raise ShapeError(f"quantpack: {name} lies on {value.device}, x on {x.device}; move one of them")
    library.check_reading("quantpack", bits, zero, signed)
    if not (is_float32(scale) and scale > 0):
        raise FormatError(f"quantpack: scale = {scale!r}; it is positive and exact in float32, round it first")
    batch, channels, height, width = x.shape
    return Problem("quantpack", batch, height, width, channels, channels, a_bits=bits, device=x.device.type)


def _implementation(
    x: Tensor,
    scale: float,
    bits: int,
    zero: int,
    signed: bool,
    multiplier: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    problem = _problem(x, scale, bits, zero, signed, multiplier, bias)
    chosen = backends.choose(problem, backend)
    if x.numel() == 0:
        return _fake(x, scale, bits, zero, signed, multiplier, bias, backend)
    if chosen == "reference":
        values = reference.read_values(x, "image", multiplier, bias)
        return encode_reference(values, Consumer(0, bits, scale, zero, signed)).contiguous()
    region = OneStep()
    size = (problem.height, problem.width, problem.in_channels)
    image = region.image(size, _DTYPES[x.dtype])
    target = region.codes("codes", size, bits, zero, signed)
    # A region must return something: the stored image, which the consumer then reads unchanged.
    emit = Emit(stream=region.stream("values", size), consumers=(Consumer(target, bits, scale, zero, signed),))
    arrays = {} if multiplier is None or bias is None else {"multiplier": multiplier, "bias": bias}
    region.steps.append(QuantPackStep("quantpack", image, emit, *arrays))
    trace: dict[int, Tensor] = {}
    region.run(x, arrays, chosen, trace)
    return trace[target]


def _fake(
    x: Tensor,
    scale: float,
    bits: int,
    zero: int,
    signed: bool,
    multiplier: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    _problem(x, scale, bits, zero, signed, multiplier, bias)
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=torch.uint8)


library.define(SCHEMA, _implementation, _fake)
