"""One operation as it stands in a network: codes (or a stream) in, codes (or what it ends in) out, on random data.

What tuning and benchmarks time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lbs_kernels.errors import ShapeError
from lbs_kernels.program.planes import MAX_BITS, pack_weights
from lbs_kernels.program.problem import TRANSPOSED, Problem
from lbs_kernels.program.steps import (
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    NibbleSpec,
    PoolStep,
    Program,
    QuantPackStep,
    ResizeStep,
    SelectStep,
    Step,
    TensorSpec,
    WeightGrid,
    build_blob,
)

LAYER = "layer"  # the name of the step in question
RESULT = 2  # the tensor it writes; 1 is what it reads (quantpack: 1 is what it writes)
SIGMAS = 2.5  # of normal weights up to the end of their grid: where 16 steps of one width have the least squared error


def layer_program(problem: Problem, seed: int = 0) -> tuple[Program, Tensor]:
    """A program whose step `layer` poses `problem`, behind a quantizer that makes its input; normal weights.

    Convolutions write codes of the bits they read, linear layers flat floats; a selection is a copy, interpolation
    doubles a quarter of its image. `result_of` names the tensor written.
    """
    if problem.op == TRANSPOSED:
        raise ShapeError(f"{problem} is no step; time the convolutions it is packed as, of lbs.cost.timed")
    tensors, steps, arrays = _head(problem)
    if problem.op in ("bitconv2d", "bitlinear"):
        arrays = _weights(problem, seed)
        steps.append(_weighted(problem, tensors))
    elif problem.op == "pool":
        steps.append(_pool(problem, tensors))
    elif problem.op == "select":
        tensors.append(replace(tensors[1], name="y"))
        bits = problem.a_bits
        emit = Emit(consumers=(Consumer(RESULT, bits, 1.0),)) if bits else Emit(stream=RESULT)
        steps.append(SelectStep(LAYER, (1,), emit))
    elif problem.op == "resize":
        steps.append(_resize(problem, tensors))
    if not tensors[-1].flat:  # a program returns something: the image, by a step of its own behind the layer
        tensors.append(replace(tensors[0], name="returned", form="stream"))
        steps.append(QuantPackStep("returned", 0, Emit(stream=len(tensors) - 1)))
    specs, blob, digest = build_blob(arrays)
    return Program(tuple(tensors), tuple(steps), (0,), (len(tensors) - 1,), specs, digest=digest), blob


def result_of(problem: Problem) -> int:
    """The tensor the step in question writes."""
    return 1 if problem.op == "quantpack" else RESULT


def _head(problem: Problem) -> tuple[list[TensorSpec], list[Step], dict[str, Tensor]]:
    """The image and the step that makes what the layer reads; for quantpack it is the layer."""
    size = (problem.in_channels, problem.height, problem.width)
    form, bits = ("codes", problem.a_bits) if problem.a_bits else ("stream", 0)
    source = _spec(problem)("x", form, *size, bits=bits)  # type: ignore[arg-type]
    emit = Emit(consumers=(Consumer(1, bits, float(_top(bits))),)) if bits else Emit(stream=1)
    name = LAYER if problem.op == "quantpack" else "input"
    return [TensorSpec("image", "image", *size), source], [QuantPackStep(name, 0, emit)], {}


def _weights(problem: Problem, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (problem.out_channels, *problem.kernel, problem.in_channels // problem.groups)
    grid, top = _grid(problem), _top(problem.w_bits)
    zero = 1 << (problem.w_bits - 1) if grid == "zero" else top / 2  # the code, or between two
    # Trained weights are no uniform codes: transforms of those (Winograd) would not fit where a network's do.
    spread = (top - zero) / SIGMAS
    codes = (zero + spread * torch.randn(shape, generator=generator)).round().clamp(0, top)
    # Products with uniform codes: this puts most outputs between the first and the last code.
    size = float((codes - zero).square().mean().sqrt()) * (2 if grid == "odd" else 1)
    multiplier = 1.0 / (0.58 * problem.reduction**0.5 * size * _top(problem.a_bits))
    return {
        "planes": pack_weights(codes.to(torch.uint8), problem.w_bits),
        "multiplier": torch.full((problem.out_channels,), multiplier, dtype=torch.float32),
        "bias": torch.ones(problem.out_channels, dtype=torch.float32),
    }


def _weighted(problem: Problem, tensors: list[TensorSpec]) -> Step:
    size = (problem.out_channels, problem.out_height, problem.out_width)
    weights = ("planes", "multiplier", "bias", _grid(problem))
    if problem.op == "bitlinear":
        tensors.append(TensorSpec("y", "stream", *size, flat=True))
        return LinearStep(LAYER, 1, Emit(stream=RESULT), problem.w_bits, problem.out_channels, *weights)
    tensors.append(_spec(problem)("y", "codes", *size, bits=problem.a_bits))
    emit = Emit(consumers=(Consumer(RESULT, problem.a_bits, _top(problem.a_bits) / 2),))
    return ConvStep(LAYER, 1, emit, problem.w_bits, *problem.window.fields(), problem.out_channels, *weights)


def _pool(problem: Problem, tensors: list[TensorSpec]) -> Step:
    """The maximum of codes or of a stream; a window of the whole stream is the mean."""
    window = problem.window.fields()[:3]
    if problem.a_bits:
        size = (problem.in_channels, problem.out_height, problem.out_width)
        tensors.append(TensorSpec("y", "codes", *size, bits=problem.a_bits))
        return PoolStep(LAYER, 1, Emit(consumers=(Consumer(RESULT, problem.a_bits, 1.0),)), "max", *window)
    size = (problem.in_channels, problem.out_height, problem.out_width)
    tensors.append(TensorSpec("y", "stream", *size, flat=size[1:] == (1, 1)))
    if problem.kernel == (problem.height, problem.width):
        return PoolStep(LAYER, 1, Emit(stream=RESULT), "mean")
    return PoolStep(LAYER, 1, Emit(stream=RESULT), "max", *window)


def _resize(problem: Problem, tensors: list[TensorSpec]) -> Step:
    """A quarter of the image, as large as all of it."""
    tensors.append(replace(tensors[1], name="y"))
    size = (problem.height, problem.width)
    return ResizeStep(LAYER, 1, Emit(stream=RESULT), size, scale=(0.5, 0.5), offset=(-0.25, -0.25))


def _spec(problem: Problem) -> type[TensorSpec]:
    """Of the codes that are read and of those that are written."""
    return NibbleSpec if problem.nibbles else TensorSpec


def _grid(problem: Problem) -> WeightGrid:
    """What networks are usually made with: a zero at 8 bits."""
    return problem.grid or ("zero" if problem.w_bits == MAX_BITS else "odd")


def _top(bits: int) -> int:
    return (1 << bits) - 1
