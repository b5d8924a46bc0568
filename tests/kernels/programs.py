"""Valid programs for tests: a builder, named cases chosen by reason, and random networks.

program, blob = CASES["preact_residual"](seed=0)
program, blob = random_program(seed=3)
inputs = random_inputs(program, batch=2, seed=1)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lbs_kernels.program.activations import KINDS
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.steps import (
    Activation,
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    PoolStep,
    Program,
    QuantPackStep,
    ResizeStep,
    SelectStep,
    Step,
    TensorSpec,
    WeightGrid,
    build_blob,
)
from lbs_kernels.program.window import Window


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


class Builder:
    """Collects tensors, steps and arrays. Random numbers are scaled so that most codes are neither 0 nor n."""

    def __init__(self, seed: int, stream_dtype: str = "float32") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.stream_dtype = stream_dtype
        self.tensors: list[TensorSpec] = []
        self.steps: list[Step] = []
        self.arrays: dict[str, Tensor] = {}
        self.inputs: list[int] = []
        self.outputs: list[int] = []

    def build(self) -> tuple[Program, Tensor]:
        specs, blob, digest = build_blob(self.arrays)
        program = Program(
            tuple(self.tensors),
            tuple(self.steps),
            tuple(self.inputs),
            tuple(self.outputs),
            specs,
            self.stream_dtype,
            digest,
        )
        return program, blob

    def _tensor(self, form: str, shape: tuple[int, int, int], **extra: object) -> int:
        height, width, channels = shape
        index = len(self.tensors)
        self.tensors.append(TensorSpec(f"{form}{index}", form, channels, height, width, **extra))  # type: ignore[arg-type]
        return index

    def shape(self, index: int) -> tuple[int, int, int]:
        spec = self.tensors[index]
        return spec.height, spec.width, spec.channels

    def image(self, channels: int, height: int, width: int, dtype: str = "float32") -> int:
        index = self._tensor("image", (height, width, channels), dtype=dtype)
        self.inputs.append(index)
        return index

    def stream(self, shape: tuple[int, int, int], output: bool = False, flat: bool = False) -> int:
        index = self._tensor("stream", shape, flat=flat)
        if output:
            self.outputs.append(index)
        return index

    def floats(self, name: str, count: int, low: float, high: float, signs: bool = False) -> str:
        values = torch.rand(count, generator=self.generator) * (high - low) + low
        if signs:
            values *= torch.randint(0, 2, (count,), generator=self.generator) * 2 - 1
        key = f"{name}{len(self.arrays)}"
        self.arrays[key] = values
        return key

    def consumer(
        self,
        shape: tuple[int, int, int],
        bits: int,
        *,
        zero: int = 0,
        signed: bool = False,
        top: float = 2.5,
        norm: bool = False,
        relu: bool = False,
        stands: bool = False,
    ) -> Consumer:
        """A new code tensor that holds 0 .. top (or -top .. top if signed, or -zero/n .. of the range) of y; whether it
        stands for y for those behind it.
        """
        n = (1 << bits) - 1
        scale = float32(n / (2 * top) if signed or zero else n / top)
        tensor = self._tensor("codes", shape, bits=bits, zero=zero, signed=signed)
        scale_key = self.floats("norm.scale", shape[2], 0.4, 1.2, signs=True) if norm else None
        bias_key = self.floats("norm.bias", shape[2], -0.2, 0.8) if norm else None
        return Consumer(
            tensor, bits, scale, zero, signed, scale_key, bias_key, relu, self.step(scale) if stands else None
        )

    @staticmethod
    def step(scale: float) -> float:
        """Of codes of that scale."""
        return float32(1 / scale)

    def activation(self, kind: str, channels: int, first: bool = False) -> Activation:
        value = {"elu": 0.75, "leaky_relu": 0.125}.get(kind, 0.0)
        slope = self.floats("slope", channels, -0.2, 0.4) if kind == "prelu" else None
        return Activation(kind, value, slope, first)  # type: ignore[arg-type]

    def quantize(self, source: int, emit: Emit, affine: bool = False) -> None:
        """`affine`: a multiplier and a bias that turn bytes, or values near 1, into values near 1."""
        spec, keys = self.tensors[source], ()
        if affine:
            low, high = (1.5 / 255, 5 / 255) if spec.dtype == "uint8" else (0.4, 1.2)
            multiplier = self.floats("multiplier", spec.channels, low, high, signs=spec.form == "stream")
            keys = (multiplier, self.floats("bias", spec.channels, -0.8, 0.4))
        self.steps.append(QuantPackStep(f"step{len(self.steps)}", source, emit, *keys))

    def selected(
        self,
        inputs: tuple[int, ...],
        emit: Emit | None = None,
        channels: tuple[int, ...] = (),
        repeat: tuple[int, int] = (1, 1),
        **moved: tuple[int, ...],
    ) -> int:
        """A selection; of codes, or of streams that nothing is said of, the tensor it makes.

        moved: size, block, stride, top, left where pixels are moved.
        """
        height, width, _ = self.shape(inputs[0])
        rows, columns = moved.get("size", (height * repeat[0], width * repeat[1]))
        places = math.prod(moved.get("block", (1, 1)))
        shape = (rows, columns, (len(channels) or sum(self.shape(i)[2] for i in inputs)) // places)
        spec = self.tensors[inputs[0]]
        if spec.form == "codes":
            made = self._tensor("codes", shape, bits=spec.bits, zero=spec.zero, signed=spec.signed)
            emit = Emit(consumers=(Consumer(made, spec.bits, 1.0, spec.zero, spec.signed),))
        elif emit is None:
            made = self.stream(shape)
            emit = Emit(stream=made)
        else:
            made = -1 if emit.stream is None else emit.stream
        self.steps.append(SelectStep(f"step{len(self.steps)}", inputs, emit, channels, repeat, **moved))  # type: ignore[arg-type]
        return made

    def resized(
        self,
        source: int,
        emit: Emit,
        size: tuple[int, int],
        scale: tuple[float, float],
        offset: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.steps.append(ResizeStep(f"step{len(self.steps)}", source, emit, size, scale, offset))

    def conv_shape(
        self,
        source: int,
        filters: int,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
    ) -> tuple[int, int, int]:
        height, width, _ = self.shape(source)
        return (*Window(kernel, stride, padding, dilation).output(height, width), filters)

    def _weights(self, source: int, filters: int, kernel: tuple[int, int], groups: int, w_bits: int) -> tuple[str, ...]:
        spec = self.tensors[source]
        channels = spec.channels // groups
        codes = torch.randint(0, 1 << w_bits, (filters, *kernel, channels), generator=self.generator, dtype=torch.uint8)
        planes = f"planes{len(self.arrays)}"
        self.arrays[planes] = pack_weights(codes, w_bits)
        n_w, n_x = (1 << w_bits) - 1, (1 << spec.bits) - 1
        reduction = kernel[0] * kernel[1] * channels
        spread = math.sqrt(reduction) * math.sqrt((n_w + 2) * n_w / 3) * n_x * (1.0 if spec.signed else 0.55)
        multiplier = self.floats("multiplier", filters, 0.5 / spread, 1.5 / spread, signs=True)
        return planes, multiplier, self.floats("bias", filters, 0.0, 1.0)

    def conv(
        self,
        source: int,
        emit: Emit,
        filters: int,
        *,
        w_bits: int,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        total_filters: int | None = None,
        grid: WeightGrid = "odd",
    ) -> None:
        planes, multiplier, bias = self._weights(source, filters, kernel, groups, w_bits)
        name = f"step{len(self.steps)}"
        total = filters if total_filters is None else total_filters
        self.steps.append(
            ConvStep(
                name, source, emit, w_bits, kernel, stride, padding, dilation, groups, total, planes, multiplier, bias,
                grid,
            )
        )  # fmt: skip

    def linear(self, source: int, emit: Emit, filters: int, *, w_bits: int, grid: WeightGrid = "odd") -> None:
        planes, multiplier, bias = self._weights(source, filters, (1, 1), 1, w_bits)
        keys = (planes, multiplier, bias)
        self.steps.append(LinearStep(f"step{len(self.steps)}", source, emit, w_bits, filters, *keys, grid))

    def pool(
        self,
        source: int,
        emit: Emit,
        kind: str,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        self.steps.append(PoolStep(f"step{len(self.steps)}", source, emit, kind, kernel, stride, padding))  # type: ignore[arg-type]


def random_inputs(program: Program, batch: int, seed: int) -> list[Tensor]:
    """Fresh images: any bytes, or normal with mean .3, so that the network-input codes use their whole range."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for spec in (program.tensors[index] for index in program.inputs):
        shape = (batch, spec.channels, spec.height, spec.width)
        if spec.dtype == "uint8":
            inputs.append(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
        else:
            inputs.append(torch.randn(shape, generator=generator) + 0.3)
    return inputs


def share_unsaturated(program: Program, trace: dict[int, Tensor]) -> float:
    """Share of codes of the whole trace that are neither 0 nor n: a test on saturated codes would prove nothing."""
    inside, total = 0, 0
    for index, spec in enumerate(program.tensors):
        if spec.form == "codes" and spec.bits > 1:
            codes = trace[index]
            inside += int(((codes > 0) & (codes < (1 << spec.bits) - 1)).sum())
            total += codes.numel()
    return inside / total if total else 1.0


def stem(
    seed: int, dtype: str, *, kernel: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]
) -> tuple[Program, Tensor]:
    """An image of three channels, normalised if it is of bytes, and a window that steps by two over its codes."""
    b = Builder(seed)
    image = b.image(3, *size, dtype=dtype)
    codes = b.consumer((*size, 3), 8, zero=91)
    b.quantize(image, Emit(consumers=(codes,)), affine=dtype == "uint8")
    window = {"kernel": kernel, "stride": (2, 2), "padding": padding}
    out = b.stream(b.conv_shape(codes.tensor, 20, **window), output=True)
    b.conv(codes.tensor, Emit(low=0.0, stream=out), 20, w_bits=8, grid="zero", **window)
    return b.build()


def stem_and_maximum(
    seed: int,
    written: str = "stream",
    *,
    size: tuple[int, int] = (13, 12),
    filters: int = 20,
    signs: bool = True,
    bits: int = 8,
    w_bits: int = 8,
    high: float | None = None,
    stream_dtype: str = "float32",
) -> tuple[Program, Tensor]:
    """A window of 7 x 7 that steps by two and a maximum of 3 x 3 behind it, of what is `written` between the two.

    stream: the maximum writes a stream and codes of `bits`. codes: a maximum of codes of `bits`. clamped: of a stream,
    clamped again, written as codes alone. Filters have weights of `w_bits`, multipliers of both signs, or of one.
    """
    b = Builder(seed, stream_dtype)
    image = b.image(3, *size)
    codes = b.consumer((*size, 3), 8, zero=91)
    b.quantize(image, Emit(consumers=(codes,)))
    window = {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}
    shape = b.conv_shape(codes.tensor, filters, **window)
    wide = b.consumer(shape, bits) if written == "codes" else None
    between = b.stream(shape) if wide is None else wide.tensor
    emit = Emit(low=0.0, high=high, stream=between) if wide is None else Emit(low=0.0, high=high, consumers=(wide,))
    b.conv(codes.tensor, emit, filters, w_bits=w_bits, grid="zero", **window)
    multiplier = next(key for key in b.arrays if key.startswith("multiplier"))
    b.arrays[multiplier] = b.arrays[multiplier] if signs else b.arrays[multiplier].abs()
    pool = b.conv_shape(between, filters, (3, 3), (2, 2), (1, 1))
    out, made = b.stream(pool, output=True) if written == "stream" else None, b.consumer(pool, bits, top=1.5)
    made = made if wide is None else replace(wide, tensor=made.tensor)
    clamp = {"low": 0.25, "high": 1.25} if written == "clamped" else {}
    b.pool(between, Emit(stream=out, consumers=(made,), **clamp), "max", (3, 3), (2, 2), (1, 1))
    if out is None:
        b.conv(made.tensor, Emit(stream=b.stream((*pool[:2], 6), output=True)), 6, w_bits=4)
    return b.build()


def depthwise_and_layer(
    seed: int,
    written: str = "stream",
    *,
    channels: int = 40,
    filters: int = 24,
    size: tuple[int, int] = (9, 7),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    w_bits: int = 8,
    between: int = 8,
    bits: int = 8,
    zeros: tuple[int, int] = (0, 0),
    high: float | None = 2.0,
    stream_dtype: str = "float32",
) -> tuple[Program, Tensor]:
    """A depthwise window of 3 x 3 over bytes, codes of `between` bits, and a 1 x 1 layer, as inverted residuals end.

    written: "stream" and codes of `bits`, "codes" alone, or both behind a "residual" of a stream or one of codes
    ("coded"). zeros: of the codes that the window reads, and writes.
    """
    b = Builder(seed, stream_dtype)
    x = b.consumer((*size, channels), 8, zero=zeros[0])
    b.quantize(b.image(channels, *size), Emit(consumers=(x,)))
    window = {"stride": stride, "padding": padding}
    height, width, _ = b.conv_shape(x.tensor, channels, **window)
    shape, layer = (height, width, filters), {"kernel": (1, 1), "padding": (0, 0)}
    emit, grid = Emit(), "zero" if w_bits == 8 else "odd"
    if written == "residual":
        emit = Emit(residual=b.stream(shape))
        b.conv(x.tensor, Emit(stream=emit.residual), filters, w_bits=4, **window)
    elif written == "coded":
        held = b.consumer(shape, 8, zero=70)
        b.conv(x.tensor, Emit(consumers=(held,)), filters, w_bits=4, **window)
        emit = Emit(residual=held.tensor, residual_step=b.step(held.scale))
    middle = b.consumer((height, width, channels), between, zero=zeros[1], top=1.8)
    b.conv(
        x.tensor, Emit(low=None if zeros[1] else 0.0, high=high, consumers=(middle,)), channels, w_bits=w_bits,
        groups=channels, grid=grid, **window,
    )  # fmt: skip
    # The sums of the second layer are of codes from 0 to n, whatever byte they are kept in.
    made = b.consumer(shape, bits)
    emit = replace(emit, consumers=(made,), stream=None if written == "codes" else b.stream(shape, output=True))
    b.conv(middle.tensor, emit, filters, w_bits=w_bits, grid=grid, **layer)
    b.conv(made.tensor, Emit(stream=b.stream((height, width, 6), output=True)), 6, w_bits=4, **layer)
    return b.build()


def one_conv(
    seed: int,
    *,
    channels: int,
    filters: int,
    size: tuple[int, int],
    w_bits: int,
    a_bits: int,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero: int = 0,
    signed: bool = False,
    out_bits: int = 4,
    stream_dtype: str = "float32",
    grid: WeightGrid = "odd",
) -> tuple[Program, Tensor]:
    """image -> codes -> one convolution -> a stream (returned) and codes: every form an epilogue writes."""
    b = Builder(seed, stream_dtype)
    image = b.image(channels, *size)
    codes = b.consumer((*size, channels), a_bits, zero=zero, signed=signed)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, filters, kernel, stride, padding, dilation)
    emit = Emit(stream=b.stream(shape, output=True), consumers=(b.consumer(shape, out_bits),))
    b.conv(
        codes.tensor,
        emit,
        filters,
        w_bits=w_bits,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        grid=grid,
    )
    return b.build()


def _head(b: Builder, stream: int, classes: int, bits: int = 8) -> None:
    """Global mean -> codes -> linear -> flat output, from a stream."""
    channels = b.shape(stream)[2]
    codes = b.consumer((1, 1, channels), bits)
    b.pool(stream, Emit(consumers=(codes,)), "mean")
    b.linear(codes.tensor, Emit(stream=b.stream((1, 1, classes), output=True, flat=True)), classes, w_bits=bits)


def _stem(b: Builder, channels: int, size: tuple[int, int], dtype: str = "float32") -> int:
    """Network input with a zero point, bytes normalised; returns the code tensor."""
    image = b.image(channels, *size, dtype=dtype)
    codes = b.consumer((*size, channels), 8, zero=117, top=2.5)
    b.quantize(image, Emit(consumers=(codes,)), affine=dtype == "uint8")
    return codes.tensor


def chain(seed: int) -> tuple[Program, Tensor]:
    """No residual: codes straight to codes through 8/8, 4/2 (13 kept filters) and 2/4, then a head over 44 channels."""
    b = Builder(seed)
    x = _stem(b, 3, (9, 7))
    for filters, w_bits, out_bits, stride in ((16, 8, 2, 1), (13, 4, 4, 2), (33, 2, 8, 1)):
        shape = b.conv_shape(x, filters, stride=(stride, stride))
        consumer = b.consumer(shape, out_bits)
        b.conv(
            x, Emit(low=0.0, consumers=(consumer,)), filters, w_bits=w_bits, stride=(stride, stride), total_filters=48
        )
        x = consumer.tensor
    shape = b.conv_shape(x, 44, (1, 1), padding=(0, 0))
    stream = b.stream(shape)
    b.conv(x, Emit(low=0.0, high=6.0, stream=stream), 44, w_bits=8, kernel=(1, 1), padding=(0, 0))
    _head(b, stream, 10)
    return b.build()


def weights_with_a_zero(seed: int) -> tuple[Program, Tensor]:
    """The grid with a zero at 8, 4 and 2 bits, depthwise among them, between layers of the odd one."""
    b = Builder(seed)
    x = _stem(b, 3, (9, 7))
    for filters, w_bits, out_bits, groups in ((33, 8, 8, 1), (33, 8, 4, 33), (13, 4, 2, 1), (16, 2, 8, 1)):
        shape = b.conv_shape(x, filters)
        codes = b.consumer(shape, out_bits)
        b.conv(x, Emit(low=0.0, consumers=(codes,)), filters, w_bits=w_bits, groups=groups, grid="zero")
        x = codes.tensor
    stream = b.stream(shape)
    b.conv(x, Emit(stream=stream), 16, w_bits=8)
    _head(b, stream, 10)
    return b.build()


def preact_residual(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Pre-activation blocks: a stream read by norms of several consumers, stride 2 with a 1x1 shortcut convolution."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (8, 8))
    shape = b.conv_shape(x, 16)
    stream = b.stream(shape)
    first = b.consumer(shape, 4, norm=True, relu=True)
    b.conv(x, Emit(stream=stream, consumers=(first,)), 16, w_bits=8)
    # Plain block: 16 -> 13 kept -> 16, residual added to the stream, next consumers at two different widths.
    shape = b.conv_shape(first.tensor, 13)
    middle = b.consumer(shape, 2)
    b.conv(first.tensor, Emit(low=0.0, consumers=(middle,)), 13, w_bits=4, total_filters=16)
    shape = b.conv_shape(middle.tensor, 16)
    joined = b.stream(shape)
    conv_in = b.consumer(shape, 8, norm=True, relu=True)
    shortcut_in = b.consumer(shape, 2, norm=True, relu=True)
    b.conv(middle.tensor, Emit(residual=stream, stream=joined, consumers=(conv_in, shortcut_in)), 16, w_bits=2)
    # Down-sampling block: the shortcut is a strided 1x1 convolution stored as a stream and added later.
    down = b.conv_shape(shortcut_in.tensor, 32, (1, 1), (2, 2), (0, 0))
    shortcut = b.stream(down)
    b.conv(shortcut_in.tensor, Emit(stream=shortcut), 32, w_bits=4, kernel=(1, 1), stride=(2, 2), padding=(0, 0))
    middle = b.consumer(down, 4)
    b.conv(conv_in.tensor, Emit(low=0.0, consumers=(middle,)), 32, w_bits=2, stride=(2, 2))
    last = b.stream(down, output=True)
    b.conv(middle.tensor, Emit(residual=shortcut, low=0.0, stream=last), 32, w_bits=8)
    _head(b, last, 7)
    return b.build()


def imagenet_stem(seed: int) -> tuple[Program, Tensor]:
    """7x7 stride 2 stem, maximum of codes with padding, bottleneck with a residual, maximum of a stream."""
    b = Builder(seed)
    x = _stem(b, 3, (23, 21))
    shape = b.conv_shape(x, 24, (7, 7), (2, 2), (3, 3))
    wide = b.consumer(shape, 4)
    b.conv(x, Emit(low=0.0, consumers=(wide,)), 24, w_bits=8, kernel=(7, 7), stride=(2, 2), padding=(3, 3))
    pooled_shape = b.conv_shape(wide.tensor, 24, (3, 3), (2, 2), (1, 1))
    pooled = b.consumer(pooled_shape, 4)
    b.pool(wide.tensor, Emit(consumers=(pooled,)), "max", (3, 3), (2, 2), (1, 1))
    height, width, _ = pooled_shape
    reduced = b.consumer((height, width, 20), 2)
    b.conv(pooled.tensor, Emit(low=0.0, consumers=(reduced,)), 20, w_bits=4, kernel=(1, 1), padding=(0, 0))
    spatial = b.consumer((height, width, 11), 4)
    b.conv(reduced.tensor, Emit(low=0.0, consumers=(spatial,)), 11, w_bits=2, total_filters=20)
    shortcut = b.stream((height, width, 65))
    b.conv(pooled.tensor, Emit(stream=shortcut), 65, w_bits=4, kernel=(1, 1), padding=(0, 0))
    joined = b.stream((height, width, 65))
    emit = Emit(residual=shortcut, low=0.0, stream=joined)
    b.conv(spatial.tensor, emit, 65, w_bits=8, kernel=(1, 1), padding=(0, 0))
    halved = b.conv_shape(joined, 65, (2, 2), (2, 2), (0, 0))
    top = b.stream(halved, output=True)
    b.pool(joined, Emit(stream=top, consumers=(b.consumer(halved, 4, norm=True, relu=True),)), "max", (2, 2), (2, 2))
    _head(b, top, 5)
    return b.build()


def coded_residual(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Residuals of codes: of a maximum, beside layers of 8 bits and of fewer; of rows that 1x1 windows read, with a
    zero and without a bound; behind an activation and a gate, next to a stream; of 13 channels. A last one of floats.
    """
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (23, 21))
    shape = b.conv_shape(x, 13, stride=(2, 2))
    wide = b.consumer(shape, 8)
    b.conv(x, Emit(low=0.0, high=2.0, consumers=(wide,)), 13, w_bits=8, stride=(2, 2))
    shape = b.conv_shape(wide.tensor, 13, (3, 3), (2, 2), (1, 1))
    pooled = b.consumer(shape, 8)
    b.pool(wide.tensor, Emit(consumers=(pooled,)), "max", (3, 3), (2, 2), (1, 1))
    held, scale = pooled.tensor, wide.scale
    for bits, zero, kernel, high in ((8, 0, 3, None), (4, 0, 3, 6.0), (8, 101, 1, None), (2, 93, 1, None)):
        window = {"kernel": (kernel, kernel), "padding": (kernel // 2, kernel // 2)}
        middle = b.consumer(shape, bits)
        b.conv(held, Emit(low=0.0, consumers=(middle,)), 13, w_bits=4, **window)  # type: ignore[arg-type]
        coded = b.consumer(shape, 8, zero=zero, stands=bits < 8)
        narrow = (b.consumer(shape, bits),) if bits < 8 else ()
        emit = Emit(residual=held, residual_step=b.step(scale), low=None if zero else 0.0, high=high)
        emit = replace(emit, consumers=(coded, *narrow))
        b.conv(middle.tensor, emit, 13, w_bits=8, **window)  # type: ignore[arg-type]
        held, scale = coded.tensor, coded.scale
    gate = b.stream((1, 1, 13))
    seen = b.stream(shape)
    b.conv(narrow[0].tensor, Emit(stream=seen), 13, w_bits=2, kernel=(1, 1), padding=(0, 0))
    b.pool(seen, Emit(activation=Activation("sigmoid"), stream=gate), "mean")
    joined = b.stream(shape)
    emit = Emit(residual=held, residual_step=b.step(scale), gate=gate, activation=Activation("silu"), stream=joined)
    coded = b.consumer(shape, 8, zero=77, stands=True)
    again = b.consumer(shape, 8, zero=50, norm=True)
    b.conv(held, replace(emit, consumers=(coded, again)), 13, w_bits=8, groups=13)
    last = b.stream(shape)
    b.conv(again.tensor, Emit(residual=joined, stream=last), 13, w_bits=8)
    tail = b.stream(shape)
    b.quantize(last, Emit(residual=coded.tensor, residual_step=b.step(coded.scale), stream=tail))
    _head(b, tail, 5)
    return b.build()


def coded_sums(filters: int, size: tuple[int, int], reader: str, groups: int = 1) -> tuple[Program, Tensor]:
    """Two 3x3 convolutions of 4 bits that add codes: where codes that stand for the sum and others are made, and where
    codes alone are. reader: of the first residual beside the sum: "none", "1x1", or "stride" of 2.
    """
    b = Builder(filters)
    image = b.image(filters, *size)
    shape = (*size, filters)
    codes, held = b.consumer(shape, 4), b.consumer(shape, 8, zero=90, top=2.0)
    b.quantize(image, Emit(consumers=(codes, held)))
    coded, narrow = b.consumer(shape, 8, zero=77, stands=True), b.consumer(shape, 3, zero=2)
    emit = Emit(residual=held.tensor, residual_step=b.step(held.scale), high=1.75, consumers=(coded, narrow))
    b.conv(codes.tensor, emit, filters, w_bits=4, groups=groups)
    window = {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2) if reader == "stride" else (1, 1)}
    if reader != "none":
        seen = b.stream(b.conv_shape(held.tensor, 5, **window), output=True)
        b.conv(held.tensor, Emit(stream=seen), 5, w_bits=8, **window)  # type: ignore[arg-type]
    alone = b.consumer(shape, 8)
    emit = Emit(residual=coded.tensor, residual_step=b.step(coded.scale), low=0.0, consumers=(alone,))
    b.conv(narrow.tensor, emit, filters, w_bits=4, groups=groups)
    b.conv(alone.tensor, Emit(stream=b.stream((*size, 6), output=True)), 6, w_bits=8, kernel=(1, 1), padding=(0, 0))
    return b.build()


def depthwise(seed: int) -> tuple[Program, Tensor]:
    """Inverted residual: 1x1 expand, 3x3 depthwise, 1x1 project (signed input), grouped and dilated convolutions."""
    b = Builder(seed)
    x = _stem(b, 3, (8, 9))
    shape = b.conv_shape(x, 12, stride=(2, 1))
    base = b.stream(shape)
    entry = b.consumer(shape, 4, signed=True)
    b.conv(x, Emit(low=0.0, high=6.0, stream=base, consumers=(entry,)), 12, w_bits=8, stride=(2, 1))
    height, width, _ = shape
    wide = b.consumer((height, width, 36), 4)
    b.conv(entry.tensor, Emit(low=0.0, high=6.0, consumers=(wide,)), 36, w_bits=4, kernel=(1, 1), padding=(0, 0))
    spatial = b.consumer((height, width, 36), 8)
    b.conv(wide.tensor, Emit(low=0.0, high=6.0, consumers=(spatial,)), 36, w_bits=8, groups=36)
    joined = b.stream((height, width, 12))
    grouped_in = b.consumer((height, width, 12), 4, relu=True)
    emit = Emit(residual=base, stream=joined, consumers=(grouped_in,))
    b.conv(spatial.tensor, emit, 12, w_bits=4, kernel=(1, 1), padding=(0, 0))
    shape = b.conv_shape(grouped_in.tensor, 20, dilation=(2, 2), padding=(2, 2))
    last = b.stream(shape)
    b.conv(grouped_in.tensor, Emit(stream=last), 20, w_bits=2, groups=4, dilation=(2, 2), padding=(2, 2))
    _head(b, last, 3)
    return b.build()


def many_consumers(seed: int) -> tuple[Program, Tensor]:
    """One convolution, seven consumers: every way to read a tensor, also those where 0 is not the lowest code."""
    b = Builder(seed, "bfloat16")
    x = _stem(b, 3, (6, 5))
    shape = b.conv_shape(x, 21)
    consumers = (
        b.consumer(shape, 1),
        b.consumer(shape, 2, signed=True, relu=True),
        b.consumer(shape, 4, zero=5, relu=True),
        b.consumer(shape, 8, zero=90, norm=True),
        b.consumer(shape, 4, signed=True, norm=True, relu=True),
        b.consumer(shape, 3, norm=True),
        b.consumer(shape, 6, relu=True),
    )
    b.conv(x, Emit(high=1.5, stream=b.stream(shape), consumers=consumers), 21, w_bits=8)
    last = 0
    for consumer in consumers:  # each is read once; the streams add up
        out = b.stream((*shape[:2], 9))
        emit = Emit(residual=last or None, stream=out)
        b.conv(consumer.tensor, emit, 9, w_bits=4, kernel=(1, 1), padding=(0, 0))
        last = out
    b.outputs.append(last)
    return b.build()


def byte_image(seed: int, channels: int = 3, size: tuple[int, int] = (9, 8)) -> tuple[Program, Tensor]:
    """Bytes to normalised codes by a multiplier and a bias; a second look at them as they are; a float image beside."""
    b = Builder(seed)
    image = b.image(channels, *size, dtype="uint8")
    codes = b.consumer((*size, channels), 8, zero=117)
    b.quantize(image, Emit(consumers=(codes,)), affine=True)
    raw = b.stream((*size, channels))
    b.quantize(image, Emit(high=200.0, stream=raw))
    shape = b.conv_shape(codes.tensor, 13)
    first = b.stream(shape)
    b.conv(codes.tensor, Emit(low=0.0, stream=first), 13, w_bits=4)
    mask = b.image(13, *size)
    joined = b.stream(shape)
    b.quantize(mask, Emit(residual=first, stream=joined), affine=True)
    b.outputs.append(raw)
    _head(b, joined, 5)
    return b.build()


def normed_stream(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Pre-activation: a norm and ReLU of a stream, read by a sum, a convolution and the mean; 13 channels, 7 x 5."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (7, 5))
    shape = b.conv_shape(x, 13)
    entry = b.stream(shape)
    b.conv(x, Emit(stream=entry), 13, w_bits=8)
    active, inner = b.stream(shape), b.consumer(shape, 4)
    b.quantize(entry, Emit(low=0.0, stream=active, consumers=(inner,)), affine=True)
    joined = b.stream(shape)
    b.conv(inner.tensor, Emit(residual=active, stream=joined), 13, w_bits=4)
    last = b.stream(shape)
    b.quantize(joined, Emit(residual=entry, low=0.0, high=6.0, stream=last), affine=True)
    _head(b, last, 5)
    return b.build()


def activated(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Every activation behind a convolution of 13 filters: in front of a sum or behind it, beside codes with a zero."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (5, 4))
    shape = b.conv_shape(x, 13)
    entry = b.stream(shape)
    codes = b.consumer(shape, 8, zero=40)
    b.conv(x, Emit(stream=entry, consumers=(codes,), activation=b.activation("silu", 13)), 13, w_bits=8)
    x, residual = codes.tensor, entry
    for place, kind in enumerate(KINDS):
        first, joined = place % 2 == 0, b.stream(shape)
        codes = b.consumer(shape, (4, 8)[place % 2], zero=(3, 40)[place % 2], top=2.0)
        emit = Emit(residual, -1.5 if first else None, stream=joined, consumers=(codes,))
        emit = replace(emit, activation=b.activation(kind, 13, first))
        b.conv(x, emit, 13, w_bits=(8, 4)[place % 2], kernel=(1, 1), padding=(0, 0))
        x, residual = codes.tensor, joined
    _head(b, residual, 5)
    return b.build()


def gated(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Squeeze and excite: a mean, two layers and a sigmoid gate a stream, behind an activation, before a sum; 37
    channels of 7 x 3 pixels. The gate is returned as well, and gates itself."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (7, 3))
    shape = b.conv_shape(x, 37)
    entry, squeezed = b.stream(shape), b.consumer((1, 1, 37), 8, zero=20)
    b.conv(x, Emit(stream=entry, activation=b.activation("hardswish", 37)), 37, w_bits=8)
    b.pool(entry, Emit(consumers=(squeezed,)), "mean")
    inner = b.consumer((1, 1, 9), 8, zero=30)
    b.conv(
        squeezed.tensor, Emit(consumers=(inner,), activation=b.activation("silu", 9)), 9, w_bits=8,
        kernel=(1, 1), padding=(0, 0),
    )  # fmt: skip
    gate = b.stream((1, 1, 37), output=True)
    sigmoid = Emit(stream=gate, activation=b.activation("sigmoid", 37))
    b.conv(inner.tensor, sigmoid, 37, w_bits=8, kernel=(1, 1), padding=(0, 0))
    again = b.stream((1, 1, 37))
    b.quantize(gate, Emit(gate, stream=again, gate=gate))
    scaled, codes = b.stream(shape), b.consumer(shape, 4, zero=2)
    b.quantize(entry, Emit(stream=scaled, consumers=(codes,), gate=gate))
    joined = b.stream(shape)
    emit = Emit(scaled, 0.0, 6.0, joined, gate=again, activation=b.activation("tanh", 37, first=True))
    b.conv(codes.tensor, emit, 37, w_bits=4)
    _head(b, joined, 5)
    return b.build()


def averaged(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Averages of windows of a stream: padded and overlapping, then halves with a column left over; 21 channels."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (9, 7))
    shape = b.conv_shape(x, 21)
    entry = b.stream(shape)
    b.conv(x, Emit(low=0.0, stream=entry), 21, w_bits=8)
    wide = b.stream(b.conv_shape(entry, 21, (3, 3), (2, 1), (1, 1)), output=True)
    b.pool(entry, Emit(stream=wide), "average", (3, 3), (2, 1), (1, 1))
    halves = b.conv_shape(wide, 21, (2, 2), (2, 2), (0, 0))
    codes, joined = b.consumer(halves, 4), b.stream(halves)
    b.pool(wide, Emit(consumers=(codes,)), "average", (2, 2), (2, 2))
    b.conv(codes.tensor, Emit(stream=joined), 21, w_bits=4)
    _head(b, joined, 5)
    return b.build()


def concatenated(seed: int, bits: int = 4, zero: int = 1) -> tuple[Program, Tensor]:
    """Codes side by side: 13 and 33 channels that share groups and words, whole groups that are copied, a channel
    taken twice, a shuffle, a small image repeated; an input and a whole are read with a stride, which moves columns."""
    b = Builder(seed)
    x = _stem(b, 3, (8, 6))
    parts = []
    for filters, stride in ((13, 1), (33, 1), (20, 2), (16, 1)):
        codes = b.consumer(b.conv_shape(x, filters, stride=(stride, stride)), bits, zero=zero)
        b.conv(x, Emit(consumers=(codes,)), filters, w_bits=8, stride=(stride, stride))
        parts.append(codes.tensor)
    thin, wide, small, even = parts
    for source in (wide, b.selected((even, even), channels=(*range(16), *range(20, 29)))):
        strided = b.stream(b.conv_shape(source, 8, (5, 5), (2, 2), (2, 2)), output=True)
        b.conv(source, Emit(stream=strided), 8, w_bits=4, kernel=(5, 5), stride=(2, 2), padding=(2, 2))
    total = None
    for place, whole in enumerate(
        (
            b.selected((thin, wide)),
            b.selected((wide, thin), channels=(*range(16, 32), *range(4), 45, 0, 0, 33, 34)),
            b.selected((b.selected((wide,), channels=tuple(i // 3 + i % 3 * 11 for i in range(33))), thin)),
            b.selected((small, wide, thin), repeat=(2, 2)),
            b.selected((thin, small), channels=(30, 2, 31, 3, 13, 0)),
        )
    ):
        joined = b.stream((8, 6, 9))
        b.conv(whole, Emit(residual=total, stream=joined), 9, w_bits=(8, 4, 2)[place % 3])
        total = joined
    _head(b, joined, 5)
    return b.build()


def selected_streams(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Streams side by side: for the norms of two readers, with everything that emit does, repeated by 2 x 3, and with
    an input that is the residual too."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (6, 9))
    streams = []
    for filters, stride in ((13, (1, 1)), (33, (1, 1)), (5, (2, 3))):
        stream = b.stream(b.conv_shape(x, filters, stride=stride))
        b.conv(x, Emit(stream=stream), filters, w_bits=8, stride=stride)
        streams.append(stream)
    thin, wide, small = streams
    one, two = (b.consumer((6, 9, 46), bits, norm=True, relu=True) for bits in (4, 8))
    b.selected((thin, wide), Emit(consumers=(one, two)))
    joined = b.stream((6, 9, 33))
    emit = Emit(wide, 0.0, 6.0, joined, activation=b.activation("prelu", 33, first=True))
    b.selected((wide, thin), emit, channels=(*range(13), *range(33, 46), 32, 31, 30, 7, 7, 7, 40))
    again = b.selected((small, joined), repeat=(2, 3))
    gate = b.stream((1, 1, 38))
    b.pool(again, Emit(stream=gate), "mean")
    codes = b.consumer((6, 9, 38), 2, signed=True)
    b.quantize(again, Emit(consumers=(codes,), gate=gate))
    last = b.stream((6, 9, 7))
    b.conv(codes.tensor, Emit(stream=last), 7, w_bits=2, kernel=(1, 1), padding=(0, 0))
    for source in (one, two):
        total = b.stream((6, 9, 7))
        b.conv(source.tensor, Emit(residual=last, stream=total), 7, w_bits=4)
        last = total
    _head(b, last, 5)
    return b.build()


def interpolated(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Bilinear interpolation: to twice the size between pixels, corner to corner with all that emit does, to fewer
    pixels, of one row, and from positions beyond the image; 13 and 33 channels."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (7, 5))
    shape = b.conv_shape(x, 13)
    entry = b.stream(shape)
    b.conv(x, Emit(stream=entry), 13, w_bits=8)
    double = b.stream((14, 10, 13), output=True)
    b.resized(entry, Emit(stream=double), (14, 10), (0.5, 0.5), (-0.25, -0.25))
    codes, again = b.consumer((5, 23, 13), 4, zero=3), b.stream((5, 23, 13))
    gate, residual = b.stream((1, 1, 13)), b.stream((5, 23, 13))
    b.pool(entry, Emit(stream=gate), "mean")
    b.resized(entry, Emit(stream=residual), (5, 23), (1.7, 0.19), (-1.3, 0.9))
    emit = Emit(residual, 0.0, 2.0, again, (codes,), b.activation("silu", 13, first=True), gate)
    b.resized(double, emit, (5, 23), (13 / 4, 9 / 22))
    wide = b.stream((5, 23, 33))
    b.conv(codes.tensor, Emit(residual=None, stream=wide), 33, w_bits=4, kernel=(1, 1), padding=(0, 0))
    b.outputs.append(again)
    row, square = b.stream((1, 23, 33)), b.consumer((6, 6, 33), 8, norm=True, relu=True)
    b.resized(wide, Emit(stream=row), (1, 23), (1.0, 1.0), (2.5, 0.0))
    b.resized(row, Emit(consumers=(square,)), (6, 6), (1.0, 23 / 6), (0.0, 23 / 12 - 0.5))
    last = b.stream((6, 6, 7))
    b.conv(square.tensor, Emit(stream=last), 7, w_bits=2)
    _head(b, last, 5)
    return b.build()


def moved(seed: int, bits: int = 4, zero: int = 1) -> tuple[Program, Tensor]:
    """Codes whose pixels are moved: shuffled as torch shuffles pixels, with channels that share groups and words; put
    together of images of several sizes and cropped to odd ones; blocks that are no squares; read with a stride, which
    moves columns; blocks to channels; cropped and thinned alone."""
    b = Builder(seed)
    x = _stem(b, 3, (8, 6))

    def layer(filters: int, padding: tuple[int, int] = (1, 1)) -> int:
        codes = b.consumer(b.conv_shape(x, filters, padding=padding), bits, zero=zero)
        b.conv(x, Emit(consumers=(codes,)), filters, w_bits=8, padding=padding)
        return codes.tensor

    def read(source: int, stride: tuple[int, int] = (1, 1)) -> None:
        stream = b.stream(b.conv_shape(source, 5, stride=stride), output=True)
        b.conv(source, Emit(stream=stream), 5, w_bits=4, stride=stride)

    wide, thin = layer(52), layer(13)
    shuffled = b.selected(
        (wide,), channels=tuple(4 * c + place for place in range(4) for c in range(13)), size=(16, 12), block=(2, 2)
    )
    read(shuffled)
    read(shuffled, (2, 2))
    parts = tuple(layer(12, padding) for padding in ((1, 1), (1, 2), (2, 1), (2, 2)))
    read(b.selected(parts, size=(15, 11), block=(2, 2), top=(0, 0, 1, 0), left=(0, 1, 0, 1)), (2, 2))
    read(b.selected((thin, thin, thin), size=(24, 5), block=(3, 1), left=(0, 1, 0)))
    flat = b.selected((thin,) * 6, size=(4, 2), stride=(2, 3), top=(0, 0, 0, 1, 1, 1), left=(0, 1, 2, 0, 1, 2))
    read(flat)
    read(b.selected((thin, wide), channels=(64, 3, 2, 1, 0, 13), size=(5, 3), top=(1, 2), left=(3, 2)))
    read(b.selected((wide,), channels=tuple(range(48)), size=(4, 6), block=(2, 4), stride=(3, 5), top=(1,)))
    return b.build()


def moved_streams(seed: int, stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """The same of streams, with everything that emit does."""
    b = Builder(seed, stream_dtype)
    x = _stem(b, 3, (6, 9))
    streams = []
    for filters, padding in ((28, (1, 1)), (7, (2, 2))):
        stream = b.stream(b.conv_shape(x, filters, padding=padding))
        b.conv(x, Emit(stream=stream), filters, w_bits=8, padding=padding)
        streams.append(stream)
    wide, thin = streams
    crop = b.selected((thin,), size=(6, 9), top=(1,), left=(2,))
    double = b.selected((wide,), size=(12, 18), block=(2, 2))
    gate = b.stream((1, 1, 7))
    b.pool(crop, Emit(stream=gate), "mean")
    codes = b.consumer((12, 18, 7), 4, norm=True, relu=True)
    last = b.stream((12, 18, 7), output=True)
    emit = Emit(double, 0.0, 6.0, last, (codes,), b.activation("prelu", 7, first=True), gate)
    b.selected((thin, thin, wide, wide), emit, (*range(7), *range(14, 28), *range(20, 27)), size=(12, 18), block=(2, 2))
    apart = b.consumer((6, 9, 28), 2, signed=True)
    corners = {"top": (0, 0, 1, 1), "left": (0, 1, 0, 1)}
    b.selected((last,) * 4, Emit(consumers=(apart,)), size=(6, 9), stride=(2, 2), **corners)
    for source in (codes, apart):
        total = b.stream(b.conv_shape(source.tensor, 3, padding=(0, 0)), output=True)
        b.conv(source.tensor, Emit(stream=total), 3, w_bits=4, padding=(0, 0))
    return b.build()


def one_pixel(seed: int) -> tuple[Program, Tensor]:
    """Everything at its smallest: one channel, one pixel, one filter, one bit."""
    b = Builder(seed)
    image = b.image(1, 1, 1)
    codes = b.consumer((1, 1, 1), 1)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = (1, 1, 1)
    middle = b.consumer(shape, 1)
    b.conv(codes.tensor, Emit(consumers=(middle,)), 1, w_bits=1)
    b.linear(middle.tensor, Emit(stream=b.stream(shape, output=True, flat=True)), 1, w_bits=1)
    return b.build()


CASES: dict[str, Callable[[int], tuple[Program, Tensor]]] = {
    "chain": chain,
    "weights_with_a_zero": weights_with_a_zero,
    "preact_residual": preact_residual,
    "preact_residual_bfloat16": lambda seed: preact_residual(seed, "bfloat16"),
    "preact_residual_float16": lambda seed: preact_residual(seed, "float16"),
    "imagenet_stem": imagenet_stem,
    "coded_residual": coded_residual,
    "coded_residual_bfloat16": lambda seed: coded_residual(seed, "bfloat16"),
    "depthwise": depthwise,
    "many_consumers": many_consumers,
    "byte_image": byte_image,
    "byte_image_of_five_channels": lambda seed: byte_image(seed, 5, (4, 8)),  # two groups, whole vectors only
    "normed_stream": normed_stream,
    "normed_stream_bfloat16": lambda seed: normed_stream(seed, "bfloat16"),
    "activated": activated,
    "activated_float16": lambda seed: activated(seed, "float16"),
    "gated": gated,
    "gated_bfloat16": lambda seed: gated(seed, "bfloat16"),
    "averaged": averaged,
    "averaged_bfloat16": lambda seed: averaged(seed, "bfloat16"),
    "concatenated": concatenated,
    "concatenated_bytes": lambda seed: concatenated(seed, 8, 37),
    "concatenated_bits": lambda seed: concatenated(seed, 1, 0),
    "selected_streams": selected_streams,
    "selected_streams_bfloat16": lambda seed: selected_streams(seed, "bfloat16"),
    "interpolated": interpolated,
    "interpolated_float16": lambda seed: interpolated(seed, "float16"),
    "moved": moved,
    "moved_bytes": lambda seed: moved(seed, 8, 37),
    "moved_bits": lambda seed: moved(seed, 1, 0),
    "moved_streams": moved_streams,
    "moved_streams_bfloat16": lambda seed: moved_streams(seed, "bfloat16"),
    "one_pixel": one_pixel,
}


def random_program(seed: int) -> tuple[Program, Tensor]:
    """A small random network: 1 to 4 residual or plain blocks of random widths, bits, kernels and strides."""
    choice = random.Random(seed)
    b = Builder(seed, choice.choice(["float32", "float16", "bfloat16"]))
    dtype = choice.choice(["float32", "float32", "uint8"])
    x = _stem(b, choice.choice([1, 3, 4]), (choice.randint(4, 13), choice.randint(4, 13)), dtype)
    filters = choice.choice([8, 13, 16, 31, 32, 33, 44])
    shape = b.conv_shape(x, filters)
    stream = b.stream(shape)
    b.conv(x, Emit(low=choice.choice([None, 0.0]), stream=stream), filters, w_bits=8)
    for _ in range(choice.randint(1, 4)):
        stream = _random_block(b, choice, stream)
    _head(b, stream, choice.choice([1, 10, 100]), choice.choice([4, 8]))
    return b.build()


def _random_block(b: Builder, choice: random.Random, stream: int) -> int:
    """Read a stream into codes (a quantpack step), two convolutions, and a new stream with or without the residual."""

    def bits() -> int:
        return choice.choice([2, 4, 8])

    def grid() -> WeightGrid:
        return choice.choice(["odd", "zero"])

    if choice.random() < 0.4:
        both = 2 * b.shape(stream)[2]
        channels = tuple(choice.randrange(both) for _ in range(choice.choice([0, 7, 32, 45])))
        stream = b.selected((stream, stream), channels=channels, repeat=choice.choice([(1, 1), (1, 1), (2, 1), (1, 3)]))
    if choice.random() < 0.2:
        (height, width, channels), size = b.shape(stream), (choice.randint(1, 15), choice.randint(1, 20))
        scale, offset = (height / size[0], width / size[1]), (choice.uniform(-1, 1), choice.uniform(-1, 1))
        made = b.stream((*size, channels))
        b.resized(stream, Emit(low=choice.choice([None, 0.0]), stream=made), size, scale, offset)
        stream = made
    shape = b.shape(stream)
    entry = b.consumer(shape, bits(), norm=choice.random() < 0.7, relu=True)
    b.quantize(stream, Emit(consumers=(entry,)), affine=choice.random() < 0.3)
    kernel = choice.choice([(1, 1), (3, 3), (3, 1), (5, 5)])
    padding = (kernel[0] // 2, kernel[1] // 2)
    stride = choice.choice([(1, 1), (1, 1), (2, 2)]) if min(shape[:2]) > 2 else (1, 1)
    hidden = choice.choice([5, 13, 16, 31, 32, 33, 44, 65])
    middle_shape = b.conv_shape(entry.tensor, hidden, kernel, stride, padding)
    middle = b.consumer(middle_shape, bits())
    emit = Emit(low=0.0, high=choice.choice([None, 6.0]), consumers=(middle,))
    window = {"kernel": kernel, "stride": stride, "padding": padding}
    b.conv(entry.tensor, emit, hidden, w_bits=bits(), **window, total_filters=80, grid=grid())  # type: ignore[arg-type]
    filters = shape[2] if choice.random() < 0.7 else choice.choice([16, 24, 47])
    last_shape = (*middle_shape[:2], filters)
    residual: int | None = None
    if last_shape == shape:
        residual = stream
    elif choice.random() < 0.7:
        residual = b.stream(last_shape)
        shortcut = Emit(stream=residual)
        window = {"kernel": (1, 1), "stride": stride, "padding": (0, 0)}
        b.conv(entry.tensor, shortcut, filters, w_bits=bits(), **window, grid=grid())  # type: ignore[arg-type]
    joined = b.stream(last_shape)
    emit = Emit(residual=residual, low=choice.choice([None, 0.0]), stream=joined)
    b.conv(middle.tensor, emit, filters, w_bits=bits(), grid=grid())
    return joined


def with_step(program: Program, index: int, **changes: object) -> Program:
    """The program with fields of one step replaced, for tests of refusal."""
    steps = list(program.steps)
    steps[index] = replace(steps[index], **changes)  # type: ignore[arg-type]
    return replace(program, steps=tuple(steps))
