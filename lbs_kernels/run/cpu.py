"""The native back end: one call into `lbs_kernels._cpu` walks the whole program."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.device import default_threads, named_isa
from lbs_kernels.extension import require_cpu
from lbs_kernels.program.runner import StepKernel, empty_outputs, empty_tensors, output_shape
from lbs_kernels.program.steps import Program
from lbs_kernels.run.algorithms import measured
from lbs_kernels.times import table


class CpuRunner:
    """Runs a program in one native call. The weights are laid out for the processor once, here.

    Where times of convolutions were measured on this machine (`lbs tune`), they are laid out for what was the fastest
    at each number of images and threads: once for every choice of algorithms, when it is first called for.
    """

    def __init__(
        self, program: Program, blob: Tensor, isa: str = "auto", algorithms: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            blob: uint8, contiguous, on the CPU; kept, and copied into every layout.
            isa: instruction set, a key of `device.isa_reasons`, or "auto": what LBS_ISA names, else the best present.
            algorithms: step name -> "direct", "lanes", "winograd", "lanes-or-direct", or "winograd-or-direct" (the
                latter where the former cannot serve); of other steps the native module guesses the faster one. Unless
                given, what was measured decides, for the isa "auto" alone: tables tell of no other.

        Raises:
            BackendError: no native module, or it cannot run `isa` here, or an algorithm does not suit its step.
            FormatError: the table of measured times cannot be read.
        """
        self.program = program
        self._blob, self._isa = blob, isa
        self._laid_out: dict[tuple[str, ...], Any] = {}
        is_free = algorithms is None and isa == "auto" and not named_isa()
        is_measured = is_free and bool(table.load(table.device_slug("cpu")).rows)
        self._chosen: dict[tuple[int, int], Any] | None = {} if is_measured else None  # by images and threads
        if is_measured:
            self.native = self._native(1, default_threads())
        else:
            given = algorithms or {}
            self.native = self._lay_out(tuple(given.get(step.name, "") for step in program.steps))
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
        run = self._run if self._chosen is None else self._native(batch, count).run
        run(images, results, batch, count, last)
        return outputs

    def _native(self, batch: int, threads: int) -> Any:
        """The layout for a number of images and threads."""
        if self._chosen is None:
            return self.native
        found = self._chosen.get((batch, threads))
        if found is None:
            found = self._lay_out(measured(self.program, batch, threads))
            self._chosen[batch, threads] = found
        return found

    def _lay_out(self, wishes: tuple[str, ...]) -> Any:
        found = self._laid_out.get(wishes)
        if found is None:
            text, blob = self.program.to_json(), self._blob
            made = require_cpu().Program(text, blob.data_ptr(), blob.numel(), self._isa, list(wishes))
            # Other wishes may have come to the same: weights are held once.
            found = next((one for one in self._laid_out.values() if one.algorithms == made.algorithms), made)
            self._laid_out[wishes] = found
        return found

    def _run_traced(self, inputs: list[Tensor], batch: int, count: int, trace: dict[int, Tensor]) -> list[Tensor]:
        outputs = empty_outputs(self.program, batch, "cpu")
        trace.update(empty_tensors(self.program, batch, "cpu"))
        pointers = {index: value.data_ptr() for index, value in trace.items()}
        trace.update(zip(self.program.inputs, inputs, strict=True))
        last = [not x.is_contiguous() for x in inputs]
        self._native(batch, count).run_traced(*_pointers(inputs, outputs), batch, count, pointers, last)
        return outputs

    def kernels(self, batch: int, *, threads: int | None = None) -> list[StepKernel]:
        """The instruction set, and the algorithm where there is more than one."""
        native = self._native(batch, default_threads() if threads is None else threads)
        names = (f"cpu/{native.isa}/{algorithm}".rstrip("/") for algorithm in native.algorithms)
        return [StepKernel(name) for name in names]

    def step_seconds(self, inputs: list[Tensor], *, threads: int | None = None, rounds: int = 30) -> list[float]:
        """Median over the calls of what each step took inside one, the threads' time scaled to add up to the call's."""
        batch = inputs[0].shape[0]
        count = default_threads() if threads is None else threads
        outputs = empty_outputs(self.program, batch, "cpu")
        last = [not x.is_contiguous() for x in inputs]
        pointers = _pointers(inputs, outputs)
        native = self._native(batch, count)
        seconds = [native.step_times(*pointers, batch, count, last) for _ in range(rounds)]
        return [statistics.median(times) for times in zip(*seconds, strict=True)]


def _pointers(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[list[int], list[int]]:
    return [x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs]
