"""A single operation as a program of one step, so that any back end that runs programs also runs the operation alone.

The program is built on every call, which costs about a millisecond: right for tests and for occasional use. Layers that
run often belong in one Program together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbs_kernels.program.steps import Consumer, Emit, Program, QuantPackStep, Step, TensorSpec, build_blob
from lbs_kernels.run.compiled import CompiledProgram

Size = tuple[int, int, int]  # height, width, channels


@dataclass
class OneStep:
    """Collects the tensors and steps around one operation."""

    tensors: list[TensorSpec] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def image(self, size: Size, dtype: str = "float32") -> int:
        """The region's input, float32 or uint8."""
        return self._add(TensorSpec("image", "image", size[2], size[0], size[1], dtype=dtype))  # type: ignore[arg-type]

    def stream(self, name: str, size: Size, output: bool = True) -> int:
        """A float32 stream, returned unless told otherwise."""
        index = self._add(TensorSpec(name, "stream", size[2], size[0], size[1]))
        if output:
            self.outputs.append(index)
        return index

    def codes(self, name: str, size: Size, bits: int, zero: int, signed: bool) -> int:
        """A tensor of codes."""
        return self._add(TensorSpec(name, "codes", size[2], size[0], size[1], bits, zero, signed))

    def _add(self, spec: TensorSpec) -> int:
        self.tensors.append(spec)
        return len(self.tensors) - 1

    def code_input(self, size: Size, bits: int, zero: int, signed: bool, output: bool = False) -> int:
        """Codes read from an image by a quantizer of scale 1; `code_image` makes the image that gives them back."""
        image = self.image(size)
        target = self.codes("codes", size, bits, zero, signed)
        stream = self.stream("values", size) if output else None
        emit = Emit(stream=stream, consumers=(Consumer(target, bits, 1.0, zero, signed),))
        self.steps.append(QuantPackStep("input", image, emit))
        return target

    def build(self, arrays: dict[str, Tensor]) -> tuple[Program, Tensor]:
        """The program and its blob."""
        specs, blob, digest = build_blob(arrays)
        return Program(tuple(self.tensors), tuple(self.steps), (0,), tuple(self.outputs), specs, digest=digest), blob

    def run(
        self, image: Tensor, arrays: dict[str, Tensor], backend: str, trace: dict[int, Tensor] | None = None
    ) -> list[Tensor]:
        """Run on an image [N, C, H, W] of the device that the back end shall use."""
        program, blob = self.build(arrays)
        return CompiledProgram(program, blob.to(image.device), backend).run([image], trace=trace)


def code_image(x_codes: Tensor, bits: int, zero: int, signed: bool) -> Tensor:
    """float32 [N, C, H, W] that a quantizer of scale 1 turns into x_codes uint8 [N, H, W, C], exactly."""
    centre = ((1 << bits) - 1) / 2 if signed else float(zero)
    return (x_codes.to(torch.float32) - centre).permute(0, 3, 1, 2).contiguous()
