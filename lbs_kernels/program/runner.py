"""What every back end gives: one protocol for running a program and for looking at how it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lbs_kernels.program.steps import STREAM_DTYPES, Program, TensorSpec


@dataclass(frozen=True)
class StepKernel:
    """What runs one step.

    name: as in tuning tables ("triton:..."), or "cpu/avx512vnni". exact: equal to the reference in every bit.
    """

    name: str
    exact: bool = True


class Runner(Protocol):
    """A program ready to run on one device. Images are checked, dense [N, C, H, W] and N >= 1."""

    program: Program

    def run(
        self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, *, threads: int | None = None
    ) -> list[Tensor]:
        """Outputs float32 [N, C, H, W] (or [N, C] where flat).

        `threads` is for back ends of the processor; torch's number unless given. `trace` receives every tensor by
        index: images as given, codes uint8 [N, H, W, C], streams in the stream dtype.
        """
        ...

    def kernels(self, batch: int, *, threads: int | None = None) -> list[StepKernel]:
        """What runs each step at one batch size and number of threads, in the order of the program."""
        ...

    def step_seconds(self, inputs: list[Tensor], *, threads: int | None = None, rounds: int = 30) -> list[float] | None:
        """Median seconds of every step, None where the back end does not tell them."""
        ...


def output_shape(spec: TensorSpec) -> tuple[int, ...]:
    """[C, H, W] of one image of an output, or [C] where flat."""
    return (spec.channels,) if spec.flat else (spec.channels, spec.height, spec.width)


def empty_outputs(program: Program, batch: int, device: torch.device | str) -> list[Tensor]:
    """Room for the outputs of a batch, float32; `batch` may be symbolic."""
    shapes = [output_shape(program.tensors[index]) for index in program.outputs]
    return [torch.empty((batch, *shape), dtype=torch.float32, device=device) for shape in shapes]


def empty_tensors(program: Program, batch: int, device: torch.device | str) -> Iterator[tuple[int, Tensor]]:
    """Room for what a trace receives, the images left out: (index, codes or stream [N, H, W, C])."""
    for index, spec in enumerate(program.tensors):
        if spec.form != "image":
            dtype = torch.uint8 if spec.form == "codes" else STREAM_DTYPES[program.stream_dtype]
            yield index, torch.empty((batch, spec.height, spec.width, spec.channels), dtype=dtype, device=device)
