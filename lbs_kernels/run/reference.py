"""The reference back end: a program walked step by step in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels.program import operations
from lbs_kernels.program.epilogue import emit_reference, fma32
from lbs_kernels.program.runner import StepKernel
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, QuantPackStep, ResizeStep, SelectStep, Step


class ReferenceRunner:
    """Runs a program exactly as it is defined; slow, and the judge of every other back end."""

    def __init__(self, program: Program, blob: Tensor) -> None:
        self.program = program
        self.blob = blob

    def run(
        self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, *, threads: int | None = None
    ) -> list[Tensor]:
        """See `Runner.run`; torch decides about threads."""
        program = self.program
        tensors: dict[int, Tensor] = dict(zip(program.inputs, inputs, strict=True))
        for step in program.steps:
            self._step(step, tensors)
        if trace is not None:
            trace.update(tensors)
        return [self._output(index, tensors[index]) for index in program.outputs]

    def kernels(self, batch: int, *, threads: int | None = None) -> list[StepKernel]:
        """The definition itself, for every step."""
        return [StepKernel("reference")] * len(self.program.steps)

    def step_seconds(self, inputs: list[Tensor], *, threads: int | None = None, rounds: int = 30) -> None:
        """It is no implementation to be timed."""
        return

    def _step(self, step: Step, tensors: dict[int, Tensor]) -> None:
        program, blob, x = self.program, self.blob, tensors[step.input]
        source = program.tensors[step.input]
        if isinstance(step, QuantPackStep):
            affine = [None if key is None else program.array(blob, key) for key in (step.multiplier, step.bias)]
            y = operations.read_values(x, source.form, *affine)
        elif isinstance(step, ConvStep | LinearStep):
            acc = self._accumulator(step, x).float()
            y = fma32(acc, program.array(blob, step.multiplier), program.array(blob, step.bias))
        elif isinstance(step, SelectStep):
            y = operations.select([tensors[index] for index in step.inputs], step)
        elif isinstance(step, ResizeStep):
            y = operations.resize(x, step.size, step.scale, step.offset)
        elif step.kind == "max":
            y = operations.max_pool(x, step.window)
        elif step.kind == "average":
            y = operations.average_pool(x, step.window)
        else:
            y = operations.mean_pool(x)
        if y.dtype == torch.uint8:  # codes pass unchanged, there is nothing to emit
            tensors[step.emit.consumers[0].tensor] = y
            return
        emit_reference(y, step.emit, program, blob, tensors)

    def _accumulator(self, step: ConvStep | LinearStep, x: Tensor) -> Tensor:
        source, planes = self.program.tensors[step.input], self.program.array(self.blob, step.planes)
        window = step.window if isinstance(step, ConvStep) else operations.LINEAR
        coding = {"a_bits": source.bits, "zero": source.zero, "signed": source.signed, "grid": step.w_grid}
        return operations.accumulate(x, planes, window, **coding)  # type: ignore[arg-type]

    def _output(self, index: int, stream: Tensor) -> Tensor:
        spec = self.program.tensors[index]
        result = stream.float().permute(0, 3, 1, 2)
        # A copy: a stream stored as float32 must not be handed out as a view of the traced tensor.
        return result.flatten(1).clone() if spec.flat else result.clone(memory_format=torch.contiguous_format)
