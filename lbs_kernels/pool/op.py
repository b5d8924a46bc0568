"""`lbs_kernels::pool`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels import library
from lbs_kernels.errors import ShapeError
from lbs_kernels.one_step import OneStep, code_image
from lbs_kernels.pool import reference
from lbs_kernels.program.planes import MAX_BITS
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Consumer, Emit, PoolStep, QuantPackStep
from lbs_kernels.run import backends

SCHEMA = "pool(Tensor x, str kind, int[2] kernel, int[2] stride, int[2] padding, str backend) -> Tensor"


def pool(
    x: Tensor,
    *,
    kind: str,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> Tensor:
    """Maximum over windows, of codes or floats (padding never wins), or the global mean of floats in a fixed order.

    Args:
        x: uint8 codes or a float32 stream, [N, H, W, C].
        kind: "max", or "mean" (global; kernel, stride and padding keep their defaults).
        kernel, stride, padding: of "max"; padding is at most half of the kernel.
        backend: "auto", "reference", "cpu", "gpu" or "triton".

    Returns:
        x's dtype, [N, H', W', C].

    Raises:
        ShapeError: another dtype or shape, or a window that does not fit. BackendError: the back end cannot serve.

    >>> x = torch.tensor([1, 4, 3, 2], dtype=torch.uint8).reshape(1, 2, 2, 1)
    >>> pool(x, kind="max", kernel=(2, 2)).item()
    4
    """
    result: Tensor = torch.ops.lbs_kernels.pool(x, kind, kernel, stride, padding, backend)
    return result


def _problem(x: Tensor, kind: str, kernel: list[int], stride: list[int], padding: list[int]) -> Problem:
    """The checked problem; sizes may be symbolic."""
    if x.dim() != 4 or x.dtype not in (torch.uint8, torch.float32):
        raise ShapeError(f"pool: x is {x.dtype} {list(x.shape)}; expected uint8 codes or float32, [N, H, W, C]")
    batch, height, width, channels = x.shape
    if kind == "mean":
        if x.dtype is not torch.float32:
            raise ShapeError(f"pool: the mean of {x.dtype}; codes have no mean of their own, decode them first")
        if [*kernel, *stride, *padding] != [1, 1, 1, 1, 0, 0]:
            raise ShapeError(
                f"pool: kernel {kernel}, stride {stride}, padding {padding}; the mean is global, give none"
            )
        kernel = [height, width]
    elif kind != "max":
        raise ShapeError(f"pool: kind {kind!r}; expected max or mean")
    if min(*kernel, *stride) < 1 or any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        raise ShapeError(
            f"pool: kernel {kernel}, stride {stride}, padding {padding}; padding is at most half the kernel"
        )
    problem = Problem(
        "pool",
        batch,
        height,
        width,
        channels,
        channels,
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        device=x.device.type,
    )
    if problem.out_height < 1 or problem.out_width < 1:
        raise ShapeError(f"pool: a kernel of {kernel} does not fit {height} x {width} pixels padded by {padding}")
    return problem


def _implementation(
    x: Tensor, kind: str, kernel: list[int], stride: list[int], padding: list[int], backend: str
) -> Tensor:
    problem = _problem(x, kind, kernel, stride, padding)
    chosen = backends.choose(problem, backend)
    if x.numel() == 0:
        return _fake(x, kind, kernel, stride, padding, backend)
    if chosen != "reference":
        return _one_step(problem, x, kind, chosen)
    if kind == "mean":
        return reference.mean_pool(x)
    return reference.max_pool(x, problem.kernel, problem.stride, problem.padding).contiguous()


def _one_step(problem: Problem, x: Tensor, kind: str, backend: str) -> Tensor:
    region = OneStep()
    size = (problem.height, problem.width, problem.in_channels)
    out_size = (problem.out_height, problem.out_width, problem.in_channels)
    window = (problem.kernel, problem.stride, problem.padding)
    if x.dtype is torch.uint8:
        codes = region.code_input(size, MAX_BITS, zero=0, signed=False, output=True)
        target = region.codes("pooled", out_size, MAX_BITS, zero=0, signed=False)
        emit = Emit(consumers=(Consumer(target, MAX_BITS, 1.0),))
        region.steps.append(PoolStep("pool", codes, emit, "max", *window))
        trace: dict[int, Tensor] = {}
        region.run(code_image(x, MAX_BITS, zero=0, signed=False), {}, backend, trace)
        return trace[target]
    image = region.image(size)
    values = region.stream("values", size, output=False)
    region.steps.append(QuantPackStep("input", image, Emit(stream=values)))
    emit = Emit(stream=region.stream("y", out_size))
    step = PoolStep("pool", values, emit, "max", *window) if kind == "max" else PoolStep("pool", values, emit, "mean")
    region.steps.append(step)
    y = region.run(x.permute(0, 3, 1, 2).contiguous(), {}, backend)[0]
    return y.permute(0, 2, 3, 1).contiguous()


def _fake(x: Tensor, kind: str, kernel: list[int], stride: list[int], padding: list[int], backend: str) -> Tensor:
    problem = _problem(x, kind, kernel, stride, padding)
    return x.new_empty((x.shape[0], problem.out_height, problem.out_width, x.shape[3]))


library.define(SCHEMA, _implementation, _fake)
