"""A stem whose pixels are folded two by two: the same sums, and the sizes that the rule states."""

from __future__ import annotations

from dataclasses import replace

import programs
import pytest
import torch

from lbs_kernels.gpu.stem import FoldedStep, fold_of, fold_stem, fold_steps, folded_problem, unfolded
from lbs_kernels.program.planes import unpack_weights
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Program
from lbs_kernels.program.window import Window

SIZES = [
    ((7, 7), (3, 3), (224, 224)),
    ((7, 7), (3, 3), (13, 12)),
    ((3, 3), (1, 1), (32, 33)),
    ((4, 6), (1, 2), (10, 10)),
]


def convolution(program: Program) -> ConvStep:
    (step,) = (step for step in program.steps if isinstance(step, ConvStep))
    return step


@pytest.mark.parametrize(("kernel", "padding", "size"), SIZES)
def test_sums_are_those_of_the_window(kernel: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]) -> None:
    program, blob = programs.stem(0, "float32", kernel=kernel, padding=padding, size=size)
    folded, changed = fold_stem(program, blob)
    before, after = convolution(program), convolution(folded)
    codes, made = program.tensors[before.input], folded.tensors[after.input]
    assert (made.channels, made.bits, made.zero) == (12, 8, codes.zero)
    values = torch.randint(0, 256, (2, *size, 3)) - codes.zero
    (writer,) = (step for step in folded.steps if isinstance(step, FoldedStep))
    top, left = writer.shift
    canvas = torch.zeros(2, 2 * made.height, 2 * made.width, 3, dtype=torch.long)
    canvas[:, top : top + size[0], left : left + size[1]] = values
    pixels = canvas.reshape(2, made.height, 2, made.width, 2, 3).permute(0, 1, 3, 2, 4, 5).flatten(3)

    def sums(own: Program, data: torch.Tensor, x: torch.Tensor, step: ConvStep) -> torch.Tensor:
        weights = unpack_weights(own.array(data, step.planes), x.shape[-1]).long() - 128
        weights = weights.reshape(-1, *step.kernel, x.shape[-1]).permute(0, 3, 1, 2)
        image = x.permute(0, 3, 1, 2).double()
        return torch.nn.functional.conv2d(image, weights.double(), None, step.stride, step.padding)

    assert torch.equal(sums(program, blob, values, before), sums(folded, changed, pixels, after))
    assert torch.equal(unfolded(pixels, before.input, program, folded), values)


def test_the_stem_of_a_resnet() -> None:
    fold = fold_of(Window((7, 7), (2, 2), (3, 3)), 224, 224, 3)
    assert fold is not None
    assert (fold.kernel, fold.padding, fold.size, fold.shift) == ((4, 4), (1, 1), (113, 113), (1, 1))
    stem = Problem("bitconv2d", 128, 224, 224, 3, 64, (7, 7), (2, 2), (3, 3))
    problem = folded_problem(stem)
    assert (problem.rows, problem.out_channels, problem.reduction) == (stem.rows, 64, 16 * 12)
    assert folded_problem(problem) == problem


@pytest.mark.parametrize(
    ("window", "size", "channels"),
    [
        (Window((7, 7), (1, 1), (3, 3)), (32, 32), 3),
        (Window((7, 7), (2, 1), (3, 3)), (32, 32), 3),
        (Window((7, 7), (2, 2), (3, 3)), (32, 32), 5),  # four pixels take more than 16 bytes
        (Window((1, 1), (2, 2), (0, 0)), (32, 32), 3),
        (Window((3, 3), (2, 2), (0, 0), (2, 2)), (33, 33), 3),
        (Window((2, 2), (2, 2), (0, 0)), (33, 33), 3),  # the last row is read by nobody
    ],
)
def test_other_windows_stay(window: Window, size: tuple[int, int], channels: int) -> None:
    assert fold_of(window, *size, channels) is None
    problem = Problem("bitconv2d", 1, *size, channels, 8, *window.fields()[:4])
    assert folded_problem(problem) == problem


def test_only_what_one_stem_reads_is_folded() -> None:
    shape = {"kernel": (7, 7), "padding": (3, 3), "size": (16, 16)}
    program, blob = programs.stem(0, "float32", **shape)  # type: ignore[arg-type]
    assert fold_steps(program) != program
    step = convolution(program)
    quantize = program.steps[0]
    read_twice = replace(program, steps=(*program.steps, replace(step, name="other")))
    odd_grid = replace(program, steps=(quantize, replace(step, w_grid="odd")))
    clamped = replace(program, steps=(replace(quantize, emit=replace(quantize.emit, low=0.0)), step))
    spec = program.tensors[step.input]
    signed = replace(program, tensors=tuple(replace(s, signed=True) if s is spec else s for s in program.tensors))
    for other in (read_twice, odd_grid, clamped, signed):
        assert fold_stem(other, blob) == (other, blob)
