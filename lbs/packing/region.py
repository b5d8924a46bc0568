"""PackedRegion: one program as a module, run by one operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbs_kernels.library import unwatched
from lbs_kernels.program.steps import Program
from lbs_kernels.run.compiled import CompiledProgram
from lbs_kernels.run.loaded import LoadedProgram

_run = torch.ops.lbs_kernels.run.default
_run_text = torch.ops.lbs_kernels.run_program.default


class PackedRegion(nn.Module):
    """A region of packed layers: one operation on a blob that moves and saves with the module.

    The operation is given a handle of the loaded program; only where the graph leaves the process (`torch.export`) it
    is given the program's text. Inputs and outputs are float32 [N, C, H, W], or [N, C] where the model has no pixels.
    """

    blob: Tensor

    def __init__(self, program: Program, blob: Tensor) -> None:
        """
        Args:
            blob: uint8, the program's arrays.
        """
        super().__init__()
        self.program = program
        self.loaded = LoadedProgram(program)
        self.register_buffer("blob", blob)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The program's outputs, in its order."""
        images = _images(inputs)
        if all(map(unwatched, images)):
            return self.run(images)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return _run_text(images, self.blob, self.loaded.text, self.loaded.allow)
        return _run(images, self.blob, self.loaded.handle)

    def run(self, images: list[Tensor]) -> list[Tensor]:
        """As `forward`, of images [N, C, H, W] and where no graph is traced."""
        blob: Tensor = self._buffers["blob"]  # type: ignore[assignment]  # self.blob takes .6 us more
        return self.loaded.run(images, blob)

    def compiled(self, backend: str = "auto") -> CompiledProgram:
        """The program ready to run on the blob's device."""
        return self.loaded.compiled(self.blob, backend)

    def run_traced(self, inputs: tuple[Tensor, ...], backend: str = "auto") -> tuple[list[Tensor], dict[int, Tensor]]:
        """Outputs, and every tensor of the program by number: codes uint8 [N, H, W, C], streams in the stream type."""
        trace: dict[int, Tensor] = {}
        images = _images(inputs)
        return self.compiled(backend).run(images, trace=trace), trace

    def extra_repr(self) -> str:
        return f"{len(self.program.steps)} steps, {self.blob.numel()} bytes"


def _images(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x if x.dim() == 4 else x[:, :, None, None] for x in inputs]
