"""A program as ONNX nodes: codes are uint8 between QuantizeLinear and DequantizeLinear, weights constants of integers.

    x = DequantizeLinear(q, 2^i, zero)       w = DequantizeLinear(integers [O, ...], 2^j[o])
    y = Conv(x, w) * F[o] + B[o]             2^i 2^j[o] F[o] = M[o]; then activation, gate, residual and clamp
    q = QuantizeLinear(y * scale, 1, zero)   of fewer than 8 bits with a clamp in front of it

M and B are the multiplier and bias of a step, with the norm in them. Scales of what a layer reads are powers of two, so
that float32 adds the products without rounding while a sum has at most 24 bits: exactly what the packed network
computes, in any order. With M itself as the weights' scale, 3 of 1,000 CIFAR-100 images of a ResNet-20 at 2 to 8 bits
come out another class; with a bias inside Conv, which ONNX Runtime makes an int32 of the accumulator's scale, 103 do.
The product and sum behind it are of float64: with two roundings of float32 a code on a boundary came out one beside it
in 31 of 40 images of a MobileNetV2, and moved all that follows (ONNX Runtime, 38 ms an image either way).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from lbs.onnx.nodes import Nodes
from lbs_kernels.errors import GraphError
from lbs_kernels.program.operations import resize_taps
from lbs_kernels.program.planes import unpack_weights, weight_units
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
)

_LARGEST = float(np.finfo(np.float32).max)
_STREAMS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class ProgramNodes:
    """Writes the steps of one program into `Nodes`."""

    def __init__(self, nodes: Nodes, program: Program, blob: Tensor, prefix: str = "", exact: bool = True) -> None:
        """
        Args:
            blob: the program's arrays. prefix: in front of the steps' names, where several programs make a graph.
            exact: round once behind an integer sum, by float64; False: float32 throughout, QuantizeLinear divides.

        Raises:
            GraphError: codes without a zero. They could be written with a half for one, which OpenVINO rounds.
        """
        signed = [spec.name for spec in program.tensors if spec.signed]
        if signed:
            raise GraphError(
                f"to_onnx: the codes {', '.join(signed)} are symmetric around 0 and none stands for it, as old files "
                "have them; ONNX wants a whole zero. Quantize or fine-tune the network again"
            )
        self.nodes, self.program, self.blob, self.prefix, self.exact = nodes, program, blob.cpu(), prefix, exact
        self.wide: list[str] = []  # layers whose weights take more bits than they have
        self.own: set[str] = set()  # what an engine computes in its own way
        self.values: dict[int, str] = {}  # codes as uint8, streams and images as float32
        self._units: dict[int, float] = {}  # the value of one code unit
        self._floats: dict[tuple[str, float], str] = {}
        self._normed = {step.emit.stream for step in program.steps if any(c.pre_scale for c in step.emit.consumers)}
        self._normed |= {step.input for step in program.steps if isinstance(step, QuantPackStep) and step.multiplier}

    def write(self, inputs: Sequence[str]) -> list[str]:
        """The names of the outputs, float32 [N, C, H, W] or [N, C], of a program that is given `inputs`."""
        self.values.update(zip(self.program.inputs, inputs, strict=True))
        for step in self.program.steps:
            self._step(step, self.prefix + step.name)
        return [self._output(index) for index in self.program.outputs]

    def _output(self, index: int) -> str:
        spec, value = self.program.tensors[index], self.values[index]
        return self.nodes.add("Flatten", [value], self.prefix + spec.name, axis=1) if spec.flat else value

    def _array(self, key: str) -> np.ndarray[Any, Any]:
        return self.program.array(self.blob, key).numpy()

    def _channels(self, key: str, place: str) -> str:
        """An array [C] as a constant that an image is multiplied by."""
        return self.nodes.floats(self._array(key).reshape(-1, 1, 1), f"{place}/{key}")

    def _step(self, step: Step, place: str) -> None:
        source = self.program.tensors[step.input]
        if isinstance(step, QuantPackStep):
            y = self._image(step, source, place)
        elif isinstance(step, ConvStep | LinearStep):
            y = self._layer(step, source, place)
        elif isinstance(step, PoolStep):
            y = self._pool(step, place)
        elif isinstance(step, SelectStep):
            y = self._select(step, place)
        else:
            y = self._resize(step, source, place)
        if source.form == "codes" and isinstance(step, PoolStep | SelectStep):
            (consumer,) = step.emit.consumers
            self.values[consumer.tensor], self._units[consumer.tensor] = y, self._units[step.input]
        else:
            self._emit(y, step.emit, place)

    def _image(self, step: QuantPackStep, source: TensorSpec, place: str) -> str:
        y = self.values[step.input]
        if source.dtype == "uint8" and source.form == "image":
            y = self.nodes.add("Cast", [y], place, to=TensorProto.FLOAT)
        if step.multiplier is not None and step.bias is not None:
            y = self._affine(y, step.multiplier, step.bias, place)
        return y

    def _affine(self, y: str, multiplier: str, bias: str, place: str) -> str:
        return self._multiplied(y, self._array(multiplier), self._array(bias), place)

    def _multiplied(self, y: str, factor: Any, bias: Any, place: str) -> str:
        """y * factor + bias by channel. One rounding where it is exact: float64 holds the product and all but the last
        bits of the sum.
        """
        kind = np.float64 if self.exact else np.float32
        operands = [np.asarray(x, dtype=kind).reshape(-1, 1, 1) for x in (factor, bias)]
        if self.exact:
            y = self.nodes.add("Cast", [y], place, to=TensorProto.DOUBLE)
        y = self.nodes.add("Mul", [y, self.nodes.constant(operands[0], f"{place}/factor")], place)
        y = self.nodes.add("Add", [y, self.nodes.constant(operands[1], f"{place}/bias")], place)
        return self.nodes.add("Cast", [y], place, to=TensorProto.FLOAT) if self.exact else y

    def _decoded(self, index: int, unit: float, place: str) -> str:
        """Codes as the floats they stand for."""
        key = self.values[index], unit
        if key not in self._floats:
            zero = np.asarray(self.program.tensors[index].zero, dtype=np.uint8)
            inputs = [key[0], self.nodes.floats(unit, f"{place}/step"), self.nodes.constant(zero, f"{place}/zero")]
            self._floats[key] = self.nodes.add("DequantizeLinear", inputs, place)
        return self._floats[key]

    def _layer(self, step: ConvStep | LinearStep, source: TensorSpec, place: str) -> str:
        unit = float(_power_of_two(np.float32(self._units[step.input])))
        x = self._decoded(step.input, unit, place)
        weight, factor = self._weight(step, source, unit, place)
        if isinstance(step, ConvStep):
            y = self.nodes.add(
                "Conv",
                [x, weight],
                place,
                kernel_shape=step.kernel,
                strides=step.stride,
                pads=(*step.padding, *step.padding),
                dilations=step.dilation,
                group=step.groups,
            )
        else:
            flat = self.nodes.add("Flatten", [x], place, axis=1)
            y = self.nodes.add("Gemm", [flat, weight], place, transB=1)
            y = self.nodes.add("Unsqueeze", [y, self.nodes.sizes(2, 3, place=f"{place}/axes")], place)
        return self._multiplied(y, factor, self._array(step.bias), place)

    def _weight(self, step: ConvStep | LinearStep, source: TensorSpec, unit: float, place: str) -> tuple[str, Any]:
        """(weights as floats, factors [O] behind them), both positive of M: negative ones negate the integers."""
        groups = step.groups if isinstance(step, ConvStep) else 1
        scale, shift = weight_units(step.w_bits, step.w_grid)
        codes = unpack_weights(self.program.array(self.blob, step.planes), source.channels // groups)
        multiplier = self._array(step.multiplier).astype(np.float64)
        integers = codes.numpy().astype(np.int32) * scale + shift  # [O, T, C]
        integers *= np.sign(multiplier).astype(np.int32)[:, None, None]
        scales = _power_of_two(np.abs(multiplier) / unit)
        if isinstance(step, ConvStep):
            integers = integers.reshape(len(integers), *step.kernel, -1).transpose(0, 3, 1, 2)
        else:
            integers = integers[:, 0]
        name, kind = self.nodes.integers(integers, f"{place}/weight")
        if int(kind.removeprefix("INT")) > max(step.w_bits, 4):
            self.wide.append(f"{place} ({step.w_bits} bits as {kind})")
        inputs = [name, self.nodes.floats(scales, f"{place}/scale")]
        weight = self.nodes.add("DequantizeLinear", inputs, f"{place}/weight", axis=0)
        factor = np.abs(multiplier) / (scales * unit)
        return weight, factor

    def _pool(self, step: PoolStep, place: str) -> str:
        x = self.values[step.input]
        if step.kind != "max":
            self.own.add(f"{step.kind} pooling")
        if step.kind == "mean":
            return self.nodes.add("GlobalAveragePool", [x], place)
        window: dict[str, Any] = {
            "kernel_shape": step.kernel,
            "strides": step.stride,
            "pads": (*step.padding, *step.padding),
        }
        if step.kind == "max":
            return self.nodes.add("MaxPool", [x], place, **window)
        return self.nodes.add("AveragePool", [x], place, count_include_pad=1, **window)

    def _select(self, step: SelectStep, place: str) -> str:
        specs = [self.program.tensors[index] for index in step.inputs]
        if step.moves:
            return self._moved(step, specs, place)
        height, width = specs[0].height * step.repeat[0], specs[0].width * step.repeat[1]
        parts = [
            self._repeated(self.values[index], height // spec.height, width // spec.width, place)
            for index, spec in zip(step.inputs, specs, strict=True)
        ]
        return self._chosen(parts, [spec.channels for spec in specs], step.channels, place)

    def _repeated(self, x: str, rows: int, columns: int, place: str) -> str:
        if (rows, columns) == (1, 1):
            return x
        scales = self.nodes.floats([1, 1, rows, columns], f"{place}/repeat")
        return self.nodes.add(
            "Resize",
            [x, "", scales],
            place,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )

    def _chosen(self, parts: Sequence[str], counts: Sequence[int], channels: Sequence[int], place: str) -> str:
        """Channels of several images of one size, side by side; none named: all."""
        whole = parts[0] if len(parts) == 1 else self.nodes.add("Concat", parts, place, axis=1)
        if not channels or list(channels) == list(range(sum(counts))):
            return whole
        if list(channels) == list(range(channels[0], channels[0] + len(channels))):
            return self._sliced(whole, [(1, channels[0], channels[0] + len(channels), 1)], place)
        return self.nodes.add("Gather", [whole, self.nodes.sizes(*channels, place=f"{place}/channels")], place, axis=1)

    def _sliced(self, x: str, ranges: Sequence[tuple[int, int, int, int]], place: str) -> str:
        """ranges: (axis, start, end, stride)."""
        axes, starts, ends, strides = zip(*ranges, strict=True)
        lists = {"starts": starts, "ends": ends, "axes": axes, "strides": strides}
        return self.nodes.add(
            "Slice", [x, *(self.nodes.sizes(*v, place=f"{place}/{k}") for k, v in lists.items())], place
        )

    def _moved(self, step: SelectStep, specs: Sequence[TensorSpec], place: str) -> str:
        """Every place of a block by itself, then all of them woven together, and what a last block has too much cut."""
        (height, width), (rows, columns) = step.size, step.block
        high, wide = -(-height // rows), -(-width // columns)
        holders = [(i, k) for i, spec in enumerate(specs) for k in range(spec.channels)]
        channels = step.channels or range(len(holders))
        each = len(channels) // (rows * columns)
        parts = []
        for at in range(rows * columns):
            size = -(-(height - at // columns) // rows), -(-(width - at % columns) // columns)
            chosen = [holders[channel] for channel in channels[at * each : (at + 1) * each]]
            used = sorted({i for i, _ in chosen})
            first = {i: sum(specs[j].channels for j in used if j < i) for i in used}
            windows = [self._window(step, i, size, (high, wide), place) for i in used]
            counts = [specs[i].channels for i in used]
            parts.append(self._chosen(windows, counts, [first[i] + k for i, k in chosen], place))
        if len(parts) == 1:
            return parts[0]
        whole = self.nodes.add("Concat", parts, place, axis=1)

        def shaped(x: str, *sizes: int) -> str:
            return self.nodes.add("Reshape", [x, self.nodes.sizes(0, *sizes, place=f"{place}/sizes")], place)

        blocks = shaped(whole, rows, columns, each, high, wide)
        woven = self.nodes.add("Transpose", [blocks], place, perm=(0, 3, 4, 1, 5, 2))
        result = shaped(woven, each, high * rows, wide * columns)
        if (high * rows, wide * columns) == (height, width):
            return result
        return self._sliced(result, [(2, 0, height, 1), (3, 0, width, 1)], place)

    def _window(self, step: SelectStep, i: int, size: tuple[int, int], full: tuple[int, int], place: str) -> str:
        """The pixels of input i that one place of a block reads, with zeros behind them up to `full`."""
        ranges = []
        for axis in (0, 1):
            start = (step.top, step.left)[axis][i] if (step.top, step.left)[axis] else 0
            stride = step.stride[axis]
            ranges.append((2 + axis, start, start + stride * (size[axis] - 1) + 1, stride))
        x = self._sliced(self.values[step.inputs[i]], ranges, place)
        if size == full:
            return x
        pads = self.nodes.sizes(0, 0, full[0] - size[0], full[1] - size[1], place=f"{place}/pads")
        return self.nodes.add("Pad", [x, pads, "", self.nodes.sizes(2, 3, place=f"{place}/axes")], place)

    def _resize(self, step: ResizeStep, source: TensorSpec, place: str) -> str:
        """Two pixels of each side with their weights, columns first, as the definition has it."""
        y = self.values[step.input]
        for axis in (1, 0):
            size = (source.height, source.width)[axis]
            first, second, weight = resize_taps(size, step.size[axis], step.scale[axis], step.offset[axis])
            near = [self._tap(y, axis, taps, share, place) for taps, share in ((first, 1 - weight), (second, weight))]
            y = self.nodes.add("Add", near, place)
        return y

    def _tap(self, y: str, axis: int, taps: Tensor, share: Tensor, place: str) -> str:
        taken = self.nodes.add(
            "Gather", [y, self.nodes.sizes(*taps.tolist(), place=f"{place}/taps")], place, axis=2 + axis
        )
        shares = share.numpy().reshape(-1, *[1] * (1 - axis))
        return self.nodes.add("Mul", [taken, self.nodes.floats(shares, f"{place}/shares")], place)

    def _emit(self, y: str, emit: Emit, place: str) -> None:
        if emit.activation is not None and emit.activation.first:
            y = self._activated(y, emit.activation, place)
        if emit.gate is not None:
            y = self.nodes.add("Mul", [y, self.values[emit.gate]], place)
        if emit.residual is not None:
            step = emit.residual_step
            other = self.values[emit.residual] if step is None else self._decoded(emit.residual, step, place)
            y = self.nodes.add("Add", [y, other], place)
        if emit.activation is not None and not emit.activation.first:
            y = self._activated(y, emit.activation, place)
        y = self._clamped(y, emit.low, emit.high, place)
        stored = _STREAMS.get(self.program.stream_dtype)
        if emit.stream is not None:
            if stored is not None:
                self.own.add(f"{self.program.stream_dtype} streams (OpenVINO keeps them in float32)")
                y = self.nodes.add("Cast", [y], place, to=stored)
                y = self.nodes.add("Cast", [y], place, to=TensorProto.FLOAT)
            if emit.stream in self._normed:
                # OpenVINO 2026.4 merges the norm into the layer that makes the stream, and what else reads it is wrong.
                ends = [self.nodes.floats(end, f"{place}/end") for end in (-_LARGEST, _LARGEST)]
                y = self.nodes.add("Clip", [y, *ends], place)
            self.values[emit.stream] = y
        for consumer in emit.consumers:
            self._consume(y, consumer, place, half=emit.stream is not None and stored is not None)
            if consumer.step is not None:
                y = self._decoded(consumer.tensor, consumer.step, place)

    def _clamped(self, y: str, low: float | None, high: float | None, place: str) -> str:
        if low is None and high is None:
            return y
        if (low, high) == (0.0, None):
            return self.nodes.add("Relu", [y], place)
        bounds = ["" if b is None else self.nodes.floats(b, f"{place}/bound") for b in (low, high)]
        return self.nodes.add("Clip", [y, *bounds] if bounds[1] else [y, bounds[0]], place)

    def _consume(self, y: str, consumer: Consumer, place: str, half: bool) -> None:
        """Codes of one consumer. half: of values in half precision, of which many lie on the boundary of two codes:
        those are multiplied by the scale, as the definition has it, in any case.
        """
        if consumer.pre_scale is not None and consumer.pre_bias is not None:
            y = self._affine(y, consumer.pre_scale, consumer.pre_bias, place)
        if consumer.relu:
            y = self.nodes.add("Relu", [y], place)
        unit = float(np.float32(1 / consumer.scale)) if consumer.step is None else consumer.step
        self._units[consumer.tensor] = unit
        if half or self.exact:
            y, unit = self.nodes.add("Mul", [y, self.nodes.floats(consumer.scale, f"{place}/scale")], place), 1.0
        if consumer.bits < 8:  # QuantizeLinear ends at 255
            last = unit * ((1 << consumer.bits) - 1 - consumer.zero)
            y = self._clamped(y, None, float(np.float32(last)), place)
        zero = self.nodes.constant(np.asarray(consumer.zero, dtype=np.uint8), f"{place}/zero")
        inputs = [y, self.nodes.floats(unit, f"{place}/unit"), zero]
        self.values[consumer.tensor] = self.nodes.add("QuantizeLinear", inputs, place)

    def _activated(self, y: str, activation: Activation, place: str) -> str:
        add, kind = self.nodes.add, activation.kind
        self.own.add(kind)
        if kind == "silu":
            return add("Mul", [y, add("Sigmoid", [y], place)], place)
        if kind == "prelu":
            assert activation.slope is not None
            return add("PRelu", [y, self._channels(activation.slope, place)], place)
        op, attributes = _FUNCTIONS[kind]
        if kind in ("elu", "leaky_relu"):
            attributes = {"alpha": activation.value}
        return add(op, [y], place, **attributes)


def _power_of_two(value: Any) -> Any:
    """The power of two nearest to positive numbers, among float32; 1 for 0.

    >>> _power_of_two(np.asarray([0.3, 1.5, 0.0])).tolist()
    [0.25, 2.0, 1.0]
    """
    exponent = np.round(np.log2(np.where(value == 0, 1, value)))
    return np.exp2(np.clip(exponent, -126, 126))


_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "elu": ("Elu", {}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hardswish": ("HardSwish", {}),
    "leaky_relu": ("LeakyRelu", {}),
    "mish": ("Mish", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
}
