"""A single operation as a program of one step, behind a step that makes its input: what every back end can run.

    step = one_step.conv(x_codes, planes, multiplier, bias, a_bits=4, kernel=(3, 3))
    y = step.run("cpu")  # float32 [N, H', W', O]

Without a multiplier and a bias, y is float32(acc).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from contenders import assert_same
from torch import Tensor

from lbs_kernels.program.steps import (
    IMAGE_DTYPES,
    Activation,
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    PoolStep,
    Program,
    QuantPackStep,
    ResizeStep,
    Step,
    TensorSpec,
    WeightGrid,
    build_blob,
)
from lbs_kernels.program.window import Window
from lbs_kernels.run.cpu import CpuRunner
from lbs_kernels.run.loaded import run_program

STEP, INPUT = "step", "input"  # names of the operation and of what makes its input
_KEYS = ("planes", "m", "b")
Size = tuple[int, int, int]  # height, width, channels


@dataclass(frozen=True)
class OneStep:
    """A program, the image that makes the operation's input, and the tensor it writes."""

    program: Program
    blob: Tensor
    image: Tensor
    result: int

    def run(self, backend: str, device: str = "cpu") -> Tensor:
        """What the operation writes: codes uint8 or floats, [N, H, W, C]. "cpu/avx2": "cpu" by these instructions."""
        trace: dict[int, Tensor] = {}
        self._run(backend, device, trace)
        if self.result in self.program.outputs:  # the same without a trace
            (y,) = self._run(backend, device, None)
            assert_same(y, trace[self.result].permute(0, 3, 1, 2), "output without a trace")
        return trace[self.result]

    def _run(self, backend: str, device: str, trace: dict[int, Tensor] | None) -> list[Tensor]:
        name, _, isa = backend.partition("/")
        if isa:
            return CpuRunner(self.program, self.blob, isa).run([self.image], trace)
        return run_program(self.program, self.blob.to(device), [self.image.to(device)], backend=name, trace=trace)


@dataclass
class _Parts:
    """Collects tensors, steps and outputs."""

    tensors: list[TensorSpec] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def image(self, size: Size, dtype: str = "float32") -> int:
        return self._add(TensorSpec("image", "image", size[2], size[0], size[1], dtype=dtype))  # type: ignore[arg-type]

    def stream(self, size: Size, output: bool = True) -> int:
        index = self._add(TensorSpec("values", "stream", size[2], size[0], size[1]))
        if output:
            self.outputs.append(index)
        return index

    def codes(self, size: Size, bits: int, zero: int, signed: bool) -> int:
        return self._add(TensorSpec("codes", "codes", size[2], size[0], size[1], bits, zero, signed))

    def code_input(self, size: Size, bits: int, zero: int, signed: bool, output: bool = False) -> int:
        """Codes read from an image by a quantizer of scale 1; `code_image` makes the image that gives them back."""
        image, target = self.image(size), self.codes(size, bits, zero, signed)
        stream = self.stream(size) if output else None
        emit = Emit(stream=stream, consumers=(Consumer(target, bits, 1.0, zero, signed),))
        self.steps.append(QuantPackStep(INPUT, image, emit))
        return target

    def _add(self, spec: TensorSpec) -> int:
        self.tensors.append(spec)
        return len(self.tensors) - 1

    def build(self, arrays: dict[str, Tensor], image: Tensor, result: int) -> OneStep:
        specs, blob, digest = build_blob(arrays)
        program = Program(tuple(self.tensors), tuple(self.steps), (0,), tuple(self.outputs), specs, digest=digest)
        return OneStep(program, blob, image, result)


def code_image(x_codes: Tensor, bits: int, zero: int, signed: bool) -> Tensor:
    """float32 [N, C, H, W] that a quantizer of scale 1 turns into x_codes uint8 [N, H, W, C], exactly."""
    centre = ((1 << bits) - 1) / 2 if signed else float(zero)
    return (x_codes.to(torch.float32) - centre).permute(0, 3, 1, 2).contiguous()


def _arrays(planes: Tensor, multiplier: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
    filters = planes.shape[1]
    return {
        "planes": planes,
        "m": torch.ones(filters) if multiplier is None else multiplier,
        "b": torch.zeros(filters) if bias is None else bias,
    }


def conv(
    x_codes: Tensor,
    planes: Tensor,
    multiplier: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    a_bits: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero: int = 0,
    signed: bool = False,
    grid: WeightGrid = "odd",
) -> OneStep:
    """bitconv2d of codes uint8 [N, H, W, C]."""
    parts = _Parts()
    size = tuple(x_codes.shape[1:])
    codes = parts.code_input(size, a_bits, zero, signed)
    window = Window(kernel, stride, padding, dilation, groups)
    y = parts.stream((*window.output(*size[:2]), planes.shape[1]))
    geometry = (*window.fields(), planes.shape[1])
    parts.steps.append(ConvStep(STEP, codes, Emit(stream=y), planes.shape[0], *geometry, *_KEYS, grid))
    return parts.build(_arrays(planes, multiplier, bias), code_image(x_codes, a_bits, zero, signed), y)


def linear(
    x_codes: Tensor,
    planes: Tensor,
    multiplier: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    a_bits: int,
    zero: int = 0,
    signed: bool = False,
    grid: WeightGrid = "odd",
) -> OneStep:
    """bitlinear of codes uint8 [N, C]."""
    parts = _Parts()
    codes = parts.code_input((1, 1, x_codes.shape[1]), a_bits, zero, signed)
    y = parts.stream((1, 1, planes.shape[1]))
    parts.steps.append(LinearStep(STEP, codes, Emit(stream=y), *planes.shape[:2], *_KEYS, grid))
    image = code_image(x_codes[:, None, None], a_bits, zero, signed)
    return parts.build(_arrays(planes, multiplier, bias), image, y)


def pool(
    x: Tensor,
    *,
    kind: str,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    bits: int = 8,
) -> OneStep:
    """pool of codes uint8 or of a float32 stream, [N, H, W, C]."""
    parts = _Parts()
    size = tuple(x.shape[1:])
    out = (1, 1, size[2]) if kind == "mean" else (*Window(kernel, stride, padding).output(*size[:2]), size[2])
    window = (kind, kernel, stride, padding)
    if x.dtype is torch.uint8:
        codes = parts.code_input(size, bits, zero=0, signed=False, output=True)
        y = parts.codes(out, bits, zero=0, signed=False)
        parts.steps.append(PoolStep(STEP, codes, Emit(consumers=(Consumer(y, bits, 1.0),)), *window))  # type: ignore[arg-type]
        return parts.build({}, code_image(x, bits, zero=0, signed=False), y)
    image, values = parts.image(size), parts.stream(size, output=False)
    parts.steps.append(QuantPackStep("input", image, Emit(stream=values)))
    y = parts.stream(out)
    parts.steps.append(PoolStep(STEP, values, Emit(stream=y), *window))  # type: ignore[arg-type]
    return parts.build({}, x.permute(0, 3, 1, 2).contiguous(), y)


def resize(
    x: Tensor, size: tuple[int, int], scale: tuple[float, float], offset: tuple[float, float] = (0.0, 0.0)
) -> OneStep:
    """resize of a float32 stream [N, H, W, C]."""
    parts = _Parts()
    height, width, channels = x.shape[1:]
    image, values = parts.image((height, width, channels)), parts.stream((height, width, channels), output=False)
    parts.steps.append(QuantPackStep(INPUT, image, Emit(stream=values)))
    y = parts.stream((*size, channels))
    parts.steps.append(ResizeStep(STEP, values, Emit(stream=y), size, scale, offset))
    return parts.build({}, x.permute(0, 3, 1, 2).contiguous(), y)


def activation(x: Tensor, activation: Activation, slope: Tensor | None = None) -> OneStep:
    """An activation of an image float32 [N, C, H, W], stored; `slope` is the array "slope"."""
    parts = _Parts()
    size = (x.shape[2], x.shape[3], x.shape[1])
    image, y = parts.image(size), parts.stream(size)
    parts.steps.append(QuantPackStep(STEP, image, Emit(stream=y, activation=activation)))
    return parts.build({} if slope is None else {"slope": slope}, x, y)


_DTYPES = {dtype: name for name, dtype in IMAGE_DTYPES.items()}


def quantpack(
    x: Tensor,
    *,
    scale: float,
    bits: int,
    zero: int = 0,
    signed: bool = False,
    multiplier: Tensor | None = None,
    bias: Tensor | None = None,
) -> OneStep:
    """quantpack of an image float32 or uint8 [N, C, H, W], in the memory format it has."""
    parts = _Parts()
    size = (x.shape[2], x.shape[3], x.shape[1])
    image, target = parts.image(size, _DTYPES[x.dtype]), parts.codes(size, bits, zero, signed)
    # A region must return something: the stored image, which the consumer then reads unchanged.
    emit = Emit(stream=parts.stream(size), consumers=(Consumer(target, bits, scale, zero, signed),))
    given = {"multiplier": multiplier, "bias": bias}
    arrays = {name: value for name, value in given.items() if value is not None}
    keys = {name: name for name in arrays}
    parts.steps.append(QuantPackStep(STEP, image, emit, **keys))
    return parts.build(arrays, x, target)
