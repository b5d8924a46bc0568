"""The native back end: one call into `lbs_kernels._cpu` walks the whole program."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels.device import default_threads
from lbs_kernels.extension import require_cpu
from lbs_kernels.program.steps import STREAM_DTYPES, Program


class CpuRunner:
    """Runs a program in one native call. The weights are laid out for the processor once, here."""

    def __init__(self, program: Program, blob: Tensor, text: str, isa: str = "auto") -> None:
        """
        Args:
            program, text: the program and its JSON text.
            blob: uint8, contiguous, on the CPU; copied.
            isa: instruction set ("portable", "avx2", "avx512vnni", "amx"), or "auto" for the best one present.

        Raises:
            BackendError: no native module, or it cannot run `isa` here.
        """
        self.program = program
        self.native = require_cpu().Program(text, blob.data_ptr(), blob.numel(), isa)
        self._output_shapes = [_output_shape(program, index) for index in program.outputs]

    def run(
        self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, threads: int | None = None
    ) -> list[Tensor]:
        """Outputs of dense images, channels first or last; see `run_program`. `threads` defaults to torch's number."""
        batch = inputs[0].shape[0]
        outputs = [torch.empty((batch, *shape), dtype=torch.float32, device="cpu") for shape in self._output_shapes]
        in_pointers = [x.data_ptr() for x in inputs]
        last = [not x.is_contiguous() for x in inputs]
        out_pointers = [y.data_ptr() for y in outputs]
        count = default_threads() if threads is None else threads
        if trace is None:
            self.native.run(in_pointers, out_pointers, batch, count, last)
            return outputs
        for index, spec in enumerate(self.program.tensors):
            if spec.form != "image":
                dtype = torch.uint8 if spec.form == "codes" else STREAM_DTYPES[self.program.stream_dtype]
                trace[index] = torch.empty((batch, spec.height, spec.width, spec.channels), dtype=dtype, device="cpu")
        pointers = {index: value.data_ptr() for index, value in trace.items()}
        trace.update(zip(self.program.inputs, inputs, strict=True))
        self.native.run_traced(in_pointers, out_pointers, batch, count, pointers, last)
        return outputs


def _output_shape(program: Program, index: int) -> tuple[int, ...]:
    spec = program.tensors[index]
    return (spec.channels,) if spec.flat else (spec.channels, spec.height, spec.width)
