"""The rules of the steps, followed in order with knowledge of which tensors hold values.

`csrc/program/walk.cpp` holds the same rules in the same order, function by function.
"""

from __future__ import annotations

import math
import struct

from lbs_kernels.errors import FormatError
from lbs_kernels.program.planes import MAX_BITS, check_accumulator, words
from lbs_kernels.program.rules import MAX_ELEMENTS, MAX_SIZE
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

Shape = tuple[int, int, int]  # height, width, channels


class Walk:
    """Follows the steps in order, knowing which tensors hold values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.written: set[int] = set()

    def check(self) -> None:
        program = self.program
        for index in program.inputs:
            if self._spec(index, "an input").form != "image":
                raise FormatError(
                    f"input {index} is a {program.tensors[index].form}; a program is given images", "input-form"
                )
            self._write(index, "the inputs")
        for step in program.steps:
            self._check_step(step)
        for index in program.outputs:
            if self._spec(index, "an output").form != "stream":
                raise FormatError(
                    f"output {index} is {program.tensors[index].form}; a program returns streams", "output-form"
                )
        if not program.outputs or len(set(program.outputs)) != len(program.outputs):
            raise FormatError(
                f"outputs are {program.outputs}; a program returns at least one tensor, each once", "outputs"
            )
        for index, spec in enumerate(program.tensors):
            if index not in self.written:
                raise FormatError(
                    f"tensor {index} ({spec.name}) is never written; drop it or write it", "never-written"
                )

    def _spec(self, index: int, place: str) -> TensorSpec:
        if not 0 <= index < len(self.program.tensors):
            raise FormatError(
                f"{place} is tensor {index}; the program has {len(self.program.tensors)}", "tensor-number"
            )
        return self.program.tensors[index]

    def _read(self, index: int, place: str) -> TensorSpec:
        spec = self._spec(index, place)
        if index not in self.written:
            raise FormatError(
                f"{place} reads tensor {index} ({spec.name}) before it is written; order the steps", "read-unwritten"
            )
        return spec

    def _write(self, index: int, place: str) -> TensorSpec:
        spec = self._spec(index, place)
        if index in self.written:
            raise FormatError(
                f"{place} writes tensor {index} ({spec.name}) a second time; each is written once", "written-twice"
            )
        self.written.add(index)
        return spec

    def _check_step(self, step: Step) -> None:
        place = f"step {step.name!r}"
        if isinstance(step, SelectStep) and not step.inputs:
            raise FormatError(f"{place} has no inputs; it selects channels of at least one", "select-inputs")
        source = self._read(step.input, place)
        if isinstance(step, QuantPackStep):
            _expect_form(source, ("image", "stream"), place)
            self._check_affine(step, source.channels, place)
            shape = (source.height, source.width, source.channels)
        elif isinstance(step, ConvStep):
            shape = self._check_conv(step, source, place)
        elif isinstance(step, LinearStep):
            shape = self._check_linear(step, source, place)
        elif isinstance(step, SelectStep):
            shape = self._check_select(step, place)
        elif isinstance(step, ResizeStep):
            shape = _check_resize(step, source, place)
        else:
            shape = _check_pool(step, source, place)
            if source.form == "codes":
                _check_unchanged(step.emit, source, place)
        unchanged = isinstance(step, PoolStep | SelectStep) and source.form == "codes"
        self._check_emit(step.emit, shape, place, scaled=not unchanged)

    def _check_affine(self, step: QuantPackStep, channels: int, place: str) -> None:
        if (step.multiplier is None) != (step.bias is None):
            raise FormatError(f"{place} has only one of multiplier and bias; give both or none", "affine-pair")
        if step.multiplier is not None and step.bias is not None:
            self._check_array(step.multiplier, "float32", (channels,), place)
            self._check_array(step.bias, "float32", (channels,), place)

    def _check_conv(self, step: ConvStep, source: TensorSpec, place: str) -> Shape:
        _expect_form(source, ("codes",), place)
        for name, pair in (("kernel", step.kernel), ("stride", step.stride), ("dilation", step.dilation)):
            if not all(1 <= size <= MAX_SIZE for size in pair):
                raise FormatError(f"{place} has {name} {pair}; sizes are 1 to {MAX_SIZE}", "window")
        for size, kernel, dilation in zip(step.padding, step.kernel, step.dilation, strict=True):
            if not 0 <= size <= dilation * (kernel - 1) + 1:
                raise FormatError(f"{place} has padding {step.padding}; it is 0 to the extent of the kernel", "padding")
        if source.signed and step.padding != (0, 0):
            raise FormatError(
                f"{place} pads signed codes, which have no code for 0; use unsigned codes or no padding",
                "signed-padding",
            )
        _check_padded(source, step.padding, place)
        filters = self._check_weights(step, source, step.window.taps, step.groups, place)
        height, width = step.window.output(source.height, source.width)
        if height < 1 or width < 1:
            raise FormatError(
                f"{place} turns {source.height} x {source.width} pixels into {height} x {width}", "output-pixels"
            )
        return height, width, filters

    def _check_linear(self, step: LinearStep, source: TensorSpec, place: str) -> Shape:
        _expect_form(source, ("codes",), place)
        if source.height * source.width != 1:
            raise FormatError(
                f"{place} reads {source.height} x {source.width} pixels; it needs one, pool first", "one-pixel"
            )
        return 1, 1, self._check_weights(step, source, 1, 1, place)

    def _check_select(self, step: SelectStep, place: str) -> Shape:
        inputs = [self._read(index, place) for index in step.inputs]
        first, total = inputs[0], sum(spec.channels for spec in inputs)
        _expect_form(first, ("codes", "stream"), place)
        if any(spec.form != first.form for spec in inputs):
            raise FormatError(f"{place} selects from codes and streams; its inputs have one form", "select-inputs")
        if first.form == "codes":
            for spec in inputs:
                _check_unchanged(step.emit, spec, place)
        if total > MAX_SIZE or not all(0 <= channel < total for channel in step.channels):
            raise FormatError(
                f"{place} selects of {total} channels; there are at most {MAX_SIZE}, numbered from 0", "select-channels"
            )
        if step.moves:
            return self._check_moved(step, inputs, place)
        if (step.block, step.stride, step.top, step.left) != ((1, 1), (1, 1), (), ()):
            raise FormatError(
                f"{place} has a block, stride, top or left and no size; what moves pixels says what it makes",
                "select-size",
            )
        height, width = first.height * step.repeat[0], first.width * step.repeat[1]
        whole = all(1 <= size <= MAX_SIZE for size in (height, width))
        if not whole or any(height % spec.height or width % spec.width for spec in inputs):
            raise FormatError(
                f"{place} repeats its first image to {height} x {width} pixels; sizes are 1 to {MAX_SIZE}, whole "
                "multiples of every input's",
                "repeat",
            )
        return height, width, len(step.channels) or total

    def _check_moved(self, step: SelectStep, inputs: list[TensorSpec], place: str) -> Shape:
        sizes = (*step.size, *step.block, *step.stride)
        sane = all(1 <= size <= MAX_SIZE for size in sizes) and step.repeat == (1, 1)
        if not sane or step.block[0] > step.size[0] or step.block[1] > step.size[1]:
            raise FormatError(
                f"{place} makes {step.size} pixels of blocks {step.block} with stride {step.stride}, repeated "
                f"{step.repeat}; they are 1 to {MAX_SIZE}, blocks no larger than the size, and nothing is repeated",
                "select-size",
            )
        offsets = [values or (0,) * len(inputs) for values in (step.top, step.left)]
        total, places = sum(spec.channels for spec in inputs), step.block[0] * step.block[1]
        listed = len(step.channels) or total
        fitting = all(len(values) == len(inputs) and all(0 <= v <= MAX_SIZE for v in values) for values in offsets)
        if not fitting or listed % places:
            raise FormatError(
                f"{place} has {len(step.top)} tops and {len(step.left)} lefts for {len(inputs)} inputs, and {listed} "
                f"channels at {places} places of a block; each input has one of 0 to {MAX_SIZE}, or none has, and "
                "every place as many channels",
                "select-window",
            )
        each = listed // places
        holders = [i for i, spec in enumerate(inputs) for _ in range(spec.channels)]
        met = {(at // each, holders[channel]) for at, channel in enumerate(step.channels or range(total))}
        for at, holder in sorted(met):
            spec, (row, column) = inputs[holder], divmod(at, step.block[1])
            last = [
                first[holder] + stride * ((size - 1 - shift) // block)
                for first, stride, size, shift, block in zip(
                    offsets, step.stride, step.size, (row, column), step.block, strict=True
                )
            ]
            if last[0] >= spec.height or last[1] >= spec.width:
                raise FormatError(
                    f"{place} reads pixel {tuple(last)} of {spec.name}, which has {spec.height} x {spec.width}",
                    "select-window",
                )
        return (*step.size, each)

    def _check_weights(
        self, step: ConvStep | LinearStep, source: TensorSpec, taps: int, groups: int, place: str
    ) -> int:
        """Bits, groups, planes, multiplier and bias of a step; returns the number of filters."""
        channels = source.channels
        if not 1 <= step.w_bits <= MAX_BITS:
            raise FormatError(f"{place} has {step.w_bits} weight bits; they are 1 to {MAX_BITS}", "weight-bits")
        if groups < 1 or channels % groups:
            raise FormatError(
                f"{place} has {groups} groups of {channels} channels; groups divide the channels", "groups"
            )
        planes = self.program.arrays.get(step.planes)
        filters = planes.shape[1] if planes is not None and len(planes.shape) == 4 else 0
        self._check_array(step.planes, "int32", (step.w_bits, filters, taps, words(channels // groups)), place)
        if filters % groups:
            raise FormatError(
                f"{place} has {filters} filters in {groups} groups; groups divide the filters", "filter-groups"
            )
        if not filters <= step.total_filters <= MAX_SIZE:
            raise FormatError(
                f"{place} keeps {filters} of {step.total_filters} filters; it cannot keep more than all",
                "total-filters",
            )
        self._check_array(step.multiplier, "float32", (filters,), place)
        self._check_array(step.bias, "float32", (filters,), place)
        check_accumulator(taps * (channels // groups), step.w_bits, source.bits, place)
        return filters

    def _check_array(self, key: str, dtype: str, shape: tuple[int, ...], place: str) -> None:
        spec = self.program.arrays.get(key)
        if spec is None:
            raise FormatError(f"{place} needs array {key!r}, which the program does not have", "array-missing")
        if spec.dtype != dtype or spec.shape != shape:
            raise FormatError(
                f"{place}: array {key!r} is {spec.dtype} {spec.shape}; the step needs {dtype} {shape}", "array-kind"
            )

    def _check_emit(self, emit: Emit, shape: Shape, place: str, scaled: bool) -> None:
        if emit.activation is not None:
            self._check_activation(emit.activation, shape, place)
        self._check_operand(emit.gate, (1, 1, shape[2]), f"{place} (gate)")
        self._check_residual(emit, shape, f"{place} (residual)")
        for name, bound in (("low", emit.low), ("high", emit.high)):
            if bound is not None and not is_float32(bound):
                raise FormatError(
                    f"{place} has {name} = {bound!r}; bounds are exact float32 values, round it first", "bound"
                )
        if emit.low is not None and emit.high is not None and emit.low > emit.high:
            raise FormatError(f"{place} clamps to {emit.low} .. {emit.high}; low is at most high", "clamp")
        if emit.stream is None and not emit.consumers:
            raise FormatError(f"{place} writes nothing; give it a stream or a consumer", "writes-nothing")
        if emit.stream is not None:
            target = self._write(emit.stream, place)
            _expect_form(target, ("stream",), f"{place} (stream)")
            _expect_shape(target, shape, place)
        for consumer in emit.consumers:
            self._check_consumer(consumer, shape, place, scaled)

    def _check_activation(self, activation: Activation, shape: Shape, place: str) -> None:
        valued = activation.kind in ("elu", "leaky_relu")
        if not (is_float32(activation.value) if valued else activation.value == 0):
            raise FormatError(
                f"{place} has {activation.kind} of value {activation.value!r}; elu and leaky_relu have one, exact in "
                "float32, the others 0",
                "activation-value",
            )
        if (activation.slope is not None) != (activation.kind == "prelu"):
            raise FormatError(
                f"{place} has {activation.kind} of slope {activation.slope!r}; prelu has one, the others none",
                "activation-slope",
            )
        if activation.slope is not None:
            self._check_array(activation.slope, "float32", (shape[2],), place)

    def _check_operand(self, index: int | None, shape: Shape, place: str) -> None:
        if index is not None:
            spec = self._read(index, place)
            _expect_form(spec, ("stream",), place)
            _expect_shape(spec, shape, place)

    def _check_residual(self, emit: Emit, shape: Shape, place: str) -> None:
        if emit.residual_step is None:
            self._check_operand(emit.residual, shape, place)
            return
        if emit.residual is None:
            raise FormatError(f"{place} has a step of {emit.residual_step!r} and no codes it is of", "code-step")
        spec = self._read(emit.residual, place)
        _expect_form(spec, ("codes",), place)
        _expect_shape(spec, shape, place)
        _check_code_step(emit.residual_step, spec, place)

    def _check_consumer(self, consumer: Consumer, shape: Shape, place: str, scaled: bool) -> None:
        target = self._write(consumer.tensor, place)
        _expect_form(target, ("codes",), f"{place} (consumer)")
        _expect_shape(target, shape, place)
        written = (consumer.bits, consumer.zero, consumer.signed)
        if written != (target.bits, target.zero, target.signed):
            raise FormatError(
                f"{place} writes codes with (bits, zero, signed) = {written} into tensor {consumer.tensor} "
                f"({target.name}), which has {(target.bits, target.zero, target.signed)}",
                "code-kind",
            )
        if scaled and not (is_float32(consumer.scale) and consumer.scale > 0):
            raise FormatError(
                f"{place} has scale {consumer.scale!r}; it is positive and exact in float32, round it first", "scale"
            )
        if consumer.step is not None:
            _check_code_step(consumer.step, target, place)
        if (consumer.pre_scale is None) != (consumer.pre_bias is None):
            raise FormatError(f"{place} has only one of pre_scale and pre_bias; give both or none", "norm-pair")
        if consumer.pre_scale is not None and consumer.pre_bias is not None:
            self._check_array(consumer.pre_scale, "float32", (shape[2],), place)
            self._check_array(consumer.pre_bias, "float32", (shape[2],), place)


def _check_pool(step: PoolStep, source: TensorSpec, place: str) -> Shape:
    if step.kind == "mean":
        _expect_form(source, ("stream",), place)
        if step.kernel not in ((1, 1), (source.height, source.width)) or step.padding != (0, 0):
            raise FormatError(
                f"{place} has kernel {step.kernel}, padding {step.padding}; the mean is global, unpadded", "mean-window"
            )
        return 1, 1, source.channels
    if step.kind not in ("max", "average"):
        raise FormatError(f"{place} has kind {step.kind!r}; expected max, mean or average", "choice")
    _expect_form(source, ("codes", "stream") if step.kind == "max" else ("stream",), place)
    for kernel, stride, padding in zip(step.kernel, step.stride, step.padding, strict=True):
        sane = 1 <= kernel <= MAX_SIZE and 1 <= stride <= MAX_SIZE
        if not sane or not 0 <= padding <= kernel // 2:
            raise FormatError(
                f"{place} has kernel {step.kernel}, stride {step.stride}, padding {step.padding}; "
                "padding is at most half of the kernel",
                "padding" if sane else "window",
            )
    _check_padded(source, step.padding, place)
    height, width = step.window.output(source.height, source.width)
    if height < 1 or width < 1:
        raise FormatError(
            f"{place} turns {source.height} x {source.width} pixels into {height} x {width}", "output-pixels"
        )
    return height, width, source.channels


def _check_resize(step: ResizeStep, source: TensorSpec, place: str) -> Shape:
    _expect_form(source, ("stream",), place)
    if not all(1 <= size <= MAX_SIZE for size in step.size) or not all(scale > 0 for scale in step.scale):
        raise FormatError(
            f"{place} interpolates to {step.size} pixels by scales {step.scale}; sizes are 1 to {MAX_SIZE}, scales "
            "positive",
            "resize",
        )
    return *step.size, source.channels


def _check_padded(source: TensorSpec, padding: tuple[int, int], place: str) -> None:
    height, width = source.height + 2 * padding[0], source.width + 2 * padding[1]
    if height * width * source.channels > MAX_ELEMENTS:
        raise FormatError(
            f"{place} reads {source.channels} x {height} x {width} elements, padding included; at most {MAX_ELEMENTS} "
            "per image",
            "padded-elements",
        )


def _check_unchanged(emit: Emit, source: TensorSpec, place: str) -> None:
    """Codes pass a maximum or a selection unchanged: exactly one consumer of the same kind, and nothing else."""
    floats = (emit.activation, emit.gate, emit.residual, emit.low, emit.high, emit.stream, emit.residual_step)
    plain = all(item is None for item in floats)
    bare = len(emit.consumers) == 1 and (emit.consumers[0].pre_scale, emit.consumers[0].step) == (None, None)
    if not plain or not bare or emit.consumers[0].relu:
        raise FormatError(
            f"{place} passes codes on; it has one plain consumer and nothing else to emit", "codes-unchanged"
        )
    consumer = emit.consumers[0]
    if (consumer.bits, consumer.zero, consumer.signed) != (source.bits, source.zero, source.signed):
        raise FormatError(
            f"{place} passes codes on; its consumer has the bits, zero and sign of its inputs", "codes-unchanged"
        )


def _check_code_step(step: float, spec: TensorSpec, place: str) -> None:
    if not (is_float32(step) and step > 0) or spec.bits != MAX_BITS or spec.signed:
        raise FormatError(
            f"{place} has step {step!r} of {spec.name}, {'signed ' if spec.signed else ''}codes of {spec.bits} bits; a "
            f"step is positive and exact in float32, of unsigned codes of {MAX_BITS} bits",
            "code-step",
        )


def _expect_form(spec: TensorSpec, forms: tuple[str, ...], place: str) -> None:
    if spec.form not in forms:
        raise FormatError(
            f"{place} uses {spec.name}, a tensor of form {spec.form}; expected {' or '.join(forms)}", "form"
        )


def _expect_shape(spec: TensorSpec, shape: Shape, place: str) -> None:
    actual = (spec.height, spec.width, spec.channels)
    if actual != shape:
        raise FormatError(
            f"{place}: {spec.name} has height, width, channels {actual}; the step computes {shape}", "shape"
        )


def is_float32(value: float) -> bool:
    """Whether a finite Python float is exactly a float32 value (so that every parser reads the same number)."""
    if not math.isfinite(value):
        return False
    try:
        return bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False
