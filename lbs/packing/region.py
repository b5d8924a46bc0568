"""PackedRegion: one program as a module, run by one operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lbs_kernels.run.compiled  # noqa: F401  registers torch.ops.lbs_kernels.run_program
from lbs_kernels.program.steps import Program
from lbs_kernels.run.compiled import CompiledProgram, compiled


class PackedRegion(nn.Module):
    """A region of packed layers: `torch.ops.lbs_kernels.run_program` on a blob that moves and saves with the module.

    Inputs and outputs are float32 [N, C, H, W], or [N, C] where the model has no pixels.
    """

    blob: Tensor

    def __init__(self, program: Program, blob: Tensor) -> None:
        """
        Args:
            blob: uint8, the program's arrays.
        """
        super().__init__()
        self.program = program
        self.text = program.to_json()
        self.allow = ""  # inexact kernels that may run, see PackedModel.fallback
        self.register_buffer("blob", blob)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The program's outputs, in its order."""
        return list(torch.ops.lbs_kernels.run_program(_images(inputs), self.blob, self.text, self.allow))

    def compiled(self, backend: str = "auto") -> CompiledProgram:
        """The program ready to run on the blob's device."""
        return compiled(self.text, self.blob, backend, self.allow)

    def run_traced(self, inputs: tuple[Tensor, ...], backend: str = "auto") -> tuple[list[Tensor], dict[int, Tensor]]:
        """Outputs, and every tensor of the program by number: codes uint8 [N, H, W, C], streams in the stream type."""
        trace: dict[int, Tensor] = {}
        return self.compiled(backend).run(_images(inputs), trace=trace), trace

    def extra_repr(self) -> str:
        return f"{len(self.program.steps)} steps, {self.blob.numel()} bytes"


def _images(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x if x.dim() == 4 else x[:, :, None, None] for x in inputs]
