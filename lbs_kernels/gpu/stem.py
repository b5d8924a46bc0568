"""A stem of few channels that steps by two pixels, as a GPU runs it: four pixels are one.

A pixel of three channels takes 16 bytes on a GPU, of which thirteen are multiplied for nothing, for each of 49 taps.
Two by two pixels side by side fill twelve of them, and the window that reads them steps by one:

    x'[j, c'] = x[2 j - shift + d, c]      c' = (d_rows * 2 + d_columns) * C + c,   x = 0 outside the image
    7 x 7, stride 2, padding 3  ->  shift 1, 4 x 4, stride 1, padding 1;   K = 49 * 16 = 784 -> 16 * 16 = 256

The step that quantizes the image writes it so (`FoldedStep`). A tap that the window does not have is a weight of 0, so
that the grid must have a zero, as that of 8 bits has. Sums are the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lbs_kernels.gpu.layout import BYTE_BITS, PITCH
from lbs_kernels.program.planes import pack_weights, unpack_weights
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Program, QuantPackStep, Step, build_blob, sources
from lbs_kernels.program.window import Window

PAIR = 2  # pixels of a side
Sides = tuple[int, int]


@dataclass(frozen=True)
class FoldedStep(QuantPackStep):
    """Quantizes an image into pixels of two by two; shift: rows and columns before the image in the first of them."""

    shift: Sides = (0, 0)


@dataclass(frozen=True)
class Fold:
    """What a window becomes: its kernel and padding, the size it reads, and `shift`."""

    kernel: Sides
    padding: Sides
    size: Sides
    shift: Sides


def fold_of(window: Window, height: int, width: int, channels: int) -> Fold | None:
    """The fold of a window over an image, None where there is none: it steps by two, over at most four channels."""
    plain = window.stride == (PAIR, PAIR) and window.dilation == (1, 1) and window.groups == 1
    if not plain or PAIR * PAIR * channels > PITCH or min(window.kernel) < PAIR:
        return None
    shift = tuple(pad % PAIR for pad in window.padding)
    padding = tuple(pad // PAIR for pad in window.padding)
    kernel = tuple(-(-taps // PAIR) for taps in window.kernel)
    out = window.output(height, width)
    size = tuple(n - 2 * pad + taps - 1 for n, pad, taps in zip(out, padding, kernel, strict=True))
    covered = all(PAIR * n - s >= side for n, s, side in zip(size, shift, (height, width), strict=True))
    if not covered:  # the window leaves pixels at the end, which would be where padding is
        return None
    return Fold(*((pair[0], pair[1]) for pair in (kernel, padding, size, shift)))


def folded_problem(problem: Problem) -> Problem:
    """The problem that a stem becomes; any other as it is."""
    fold = fold_of(problem.window, problem.height, problem.width, problem.in_channels)
    if problem.op != ConvStep.op or fold is None:
        return problem
    (height, width), channels = fold.size, PAIR * PAIR * problem.in_channels
    size = replace(problem, height=height, width=width, in_channels=channels)
    return replace(size, kernel=fold.kernel, stride=(1, 1), padding=fold.padding)


def fold_planes(planes: Tensor, step: ConvStep, channels: int) -> Tensor:
    """Weight planes of the folded window, from int32 [w_bits, O, T, CW]."""
    codes = unpack_weights(planes.cpu(), channels)
    filters = codes.shape[0]
    rows, columns = (-(-taps // PAIR) for taps in step.kernel)
    whole = torch.full((filters, PAIR * rows, PAIR * columns, channels), 1 << (step.w_bits - 1), dtype=torch.uint8)
    whole[:, : step.kernel[0], : step.kernel[1]] = codes.reshape(filters, *step.kernel, channels)
    places = whole.reshape(filters, rows, PAIR, columns, PAIR, channels).permute(0, 1, 3, 2, 4, 5)
    return pack_weights(places.reshape(filters, rows, columns, PAIR * PAIR * channels), step.w_bits)


def fold_steps(program: Program) -> Program:
    """The program with its stem folded, without the arrays: for what is counted. It may be the same."""
    steps, tensors = list(program.steps), list(program.tensors)
    for place, step in enumerate(program.steps):
        writer = _writer(program, step)
        if not isinstance(step, ConvStep) or writer is None:
            continue
        source = program.tensors[step.input]
        fold = fold_of(step.window, source.height, source.width, source.channels)
        if fold is None or step.w_grid != "zero":
            continue
        channels = PAIR * PAIR * source.channels
        tensors[step.input] = replace(source, height=fold.size[0], width=fold.size[1], channels=channels)
        steps[place] = replace(step, kernel=fold.kernel, stride=(1, 1), padding=fold.padding)
        was = program.steps[writer]
        assert isinstance(was, QuantPackStep)
        steps[writer] = FoldedStep(was.name, was.input, was.emit, was.multiplier, was.bias, fold.shift)
    if steps == list(program.steps):
        return program
    return replace(program, steps=tuple(steps), tensors=tuple(tensors))


def fold_stem(program: Program, blob: Tensor) -> tuple[Program, Tensor]:
    """The program with its stem folded, and its arrays; both as they are where there is none."""
    folded = fold_steps(program)
    if folded is program:
        return program, blob
    arrays = {key: program.array(blob, key) for key in program.arrays}
    for old, new in zip(program.steps, folded.steps, strict=True):
        if isinstance(old, ConvStep) and old != new:
            arrays[old.planes] = fold_planes(arrays[old.planes], old, program.tensors[old.input].channels)
    specs, blob, digest = build_blob(arrays)
    return replace(folded, arrays=specs, digest=digest), blob


def unfolded(codes: Tensor, index: int, program: Program, folded: Program) -> Tensor:
    """Codes [N, H, W, C] of tensor `index` of `program`, of what `folded` holds of it."""
    spec = program.tensors[index]
    (writer,) = (s for s in folded.steps if isinstance(s, FoldedStep) and s.emit.consumers[0].tensor == index)
    batch, height, width, _ = codes.shape
    places = codes.reshape(batch, height, width, PAIR, PAIR, spec.channels).permute(0, 1, 3, 2, 4, 5)
    pixels = places.reshape(batch, PAIR * height, PAIR * width, spec.channels)
    top, left = writer.shift
    return pixels[:, top : top + spec.height, left : left + spec.width].contiguous()


def _writer(program: Program, step: Step) -> int | None:
    """The place of the step that quantizes an image for this one alone, if one does, into unsigned bytes of a weight
    and activation that fit it.
    """
    if not isinstance(step, ConvStep):
        return None
    source = program.tensors[step.input]
    readers = [other for other in program.steps if step.input in sources(other)]
    if len(readers) != 1 or source.bits != BYTE_BITS or source.signed:
        return None
    for place, other in enumerate(program.steps):
        written = [consumer.tensor for consumer in other.emit.consumers]
        if step.input in written:
            emit = other.emit
            plain = type(other) is QuantPackStep and other.input in program.inputs and written == [step.input]
            bare = (emit.stream, emit.residual, emit.low, emit.high, emit.activation, emit.gate) == (None,) * 6
            return place if plain and bare and emit.consumers[0].pre_scale is None else None
    return None
