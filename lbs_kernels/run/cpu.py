"""The native back end: one call into `lbs_kernels._cpu` walks the whole program."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from lbs_kernels.device import default_threads
from lbs_kernels.extension import require_cpu
from lbs_kernels.program.runner import StepKernel, empty_outputs, empty_tensors, output_shape
from lbs_kernels.program.steps import Program


class CpuRunner:
    """Runs a program in one native call. The weights are laid out for the processor once, here."""

    def __init__(
        self, program: Program, blob: Tensor, isa: str = "auto", algorithms: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            blob: uint8, contiguous, on the CPU; copied.
            isa: instruction set ("portable", "avx2", "avx512vnni", "amx"), or "auto" for the best one present.
            algorithms: step name -> "direct" or "winograd", for convolutions where the faster one is not to be guessed.

        Raises:
            BackendError: no native module, or it cannot run `isa` here, or an algorithm does not suit its step.
        """
        given = algorithms or {}
        chosen = [given.get(step.name, "") for step in program.steps] if given else []
        self.program = program
        self.native = require_cpu().Program(program.to_json(), blob.data_ptr(), blob.numel(), isa, chosen)
        self._run = self.native.run
        self._shapes = [output_shape(program.tensors[index]) for index in program.outputs]
        self._float = torch.empty(0, dtype=torch.float32, device="cpu")  # new_empty asks for no default

    def run(
        self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, *, threads: int | None = None
    ) -> list[Tensor]:
        """See `Runner.run`; images channels first or last."""
        batch = inputs[0].shape[0]
        count = default_threads() if threads is None else threads
        if trace is not None:
            return self._run_traced(inputs, batch, count, trace)
        images, last, outputs, results = [], [], [], []  # loops: a comprehension is a call
        for x in inputs:
            images.append(x.data_ptr())
            last.append(not x.is_contiguous())
        for shape in self._shapes:
            y = self._float.new_empty(batch, *shape)
            outputs.append(y)
            results.append(y.data_ptr())
        self._run(images, results, batch, count, last)
        return outputs

    def _run_traced(self, inputs: list[Tensor], batch: int, count: int, trace: dict[int, Tensor]) -> list[Tensor]:
        outputs = empty_outputs(self.program, batch, "cpu")
        trace.update(empty_tensors(self.program, batch, "cpu"))
        pointers = {index: value.data_ptr() for index, value in trace.items()}
        trace.update(zip(self.program.inputs, inputs, strict=True))
        last = [not x.is_contiguous() for x in inputs]
        self.native.run_traced(*_pointers(inputs, outputs), batch, count, pointers, last)
        return outputs

    def kernels(self, batch: int) -> list[StepKernel]:
        """The instruction set, and the algorithm where there is more than one."""
        names = (f"cpu/{self.native.isa}/{algorithm}".rstrip("/") for algorithm in self.native.algorithms)
        return [StepKernel(name) for name in names]

    def step_seconds(self, inputs: list[Tensor], *, threads: int | None = None, rounds: int = 30) -> list[float]:
        """Median over the calls of what each step took inside one, the threads' time scaled to add up to the call's."""
        batch = inputs[0].shape[0]
        count = default_threads() if threads is None else threads
        outputs = empty_outputs(self.program, batch, "cpu")
        last = [not x.is_contiguous() for x in inputs]
        pointers = _pointers(inputs, outputs)
        measured = [self.native.step_times(*pointers, batch, count, last) for _ in range(rounds)]
        return [statistics.median(times) for times in zip(*measured, strict=True)]


def _pointers(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[list[int], list[int]]:
    return [x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs]
