"""The rules a program must keep, checked before anything is allocated from its numbers."""

from __future__ import annotations

import math
import re
import struct

from lbs_kernels.errors import FormatError
from lbs_kernels.program.planes import MAX_BITS, check_accumulator, words
from lbs_kernels.program.problem import output_size
from lbs_kernels.program.steps import (
    ARRAY_DTYPES,
    BLOB_ALIGNMENT,
    IMAGE_DTYPES,
    STREAM_DTYPES,
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    PoolStep,
    Program,
    QuantPackStep,
    Step,
    TensorSpec,
)

MAX_COUNT = 1 << 16  # tensors, steps, arrays
MAX_SIZE = 1 << 24  # one dimension; float32 counts exactly this far
MAX_ELEMENTS = 1 << 28  # one tensor of one image
MAX_NAME = 256

Shape = tuple[int, int, int]  # height, width, channels


def check_program(program: Program, blob_bytes: int | None = None) -> None:
    """Refuse a program that

    - numbers tensors that do not exist, writes one twice or never, or reads one before it is written;
    - has sizes that are not positive, absurd, or do not follow from the step that writes them;
    - has arrays outside the blob, unaligned, or of another shape than their step needs;
    - pads signed codes, could overflow an accumulator, or mixes tensor forms;
    - says it is of version 1 and uses what came with version 2.

    Raises:
        FormatError: what, where, the value and the rule.
    """
    for name, items in (("tensors", program.tensors), ("steps", program.steps), ("arrays", program.arrays)):
        if len(items) > MAX_COUNT:
            raise FormatError(f"program has {len(items)} {name}; at most {MAX_COUNT} are allowed")
    if program.stream_dtype not in STREAM_DTYPES:
        raise FormatError(f"stream_dtype is {program.stream_dtype!r}; expected one of {', '.join(STREAM_DTYPES)}")
    if not re.fullmatch(r"([0-9a-f]{64})?", program.digest):
        raise FormatError(f"digest is {program.digest[:80]!r}; expected 64 hexadecimal digits, or nothing")
    for index, spec in enumerate(program.tensors):
        _check_tensor(spec, f"tensor {index}")
    _check_version(program)
    for key in program.arrays:
        _check_array(program, key, blob_bytes)
    _Walk(program).check()


def _check_version(program: Program) -> None:
    if program.version > 1:
        return
    for spec in program.tensors:
        if spec.dtype != "float32":
            raise FormatError(f"image {spec.name} is {spec.dtype} in a program of version 1; write it as version 2")
    for step in program.steps:
        if isinstance(step, QuantPackStep) and (step.multiplier, step.bias) != (None, None):
            raise FormatError(
                f"step {step.name!r} has a multiplier or bias in a program of version 1; write it as version 2"
            )


def _check_name(name: str, place: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise FormatError(f"{place} is named {name[:MAX_NAME]!r}; names are 1 to {MAX_NAME} printable characters")


def _check_tensor(spec: TensorSpec, place: str) -> None:
    _check_name(spec.name, place)
    if spec.form not in ("image", "codes", "stream"):
        raise FormatError(f"{place} has form {spec.form!r}; expected image, codes or stream")
    for name, size in (("channels", spec.channels), ("height", spec.height), ("width", spec.width)):
        if not 1 <= size <= MAX_SIZE:
            raise FormatError(f"{place} has {name} = {size}; sizes are 1 to {MAX_SIZE}")
    if spec.channels * spec.height * spec.width > MAX_ELEMENTS:
        raise FormatError(
            f"{place} has {spec.channels} x {spec.height} x {spec.width} elements; at most {MAX_ELEMENTS} per image"
        )
    if spec.form == "codes":
        if not 1 <= spec.bits <= MAX_BITS:
            raise FormatError(f"{place} has {spec.bits} bits; codes have 1 to {MAX_BITS}")
        if not 0 <= spec.zero < 1 << spec.bits:
            raise FormatError(f"{place} has zero = {spec.zero}; it is a code, 0 to {(1 << spec.bits) - 1}")
        if spec.signed and spec.zero:
            raise FormatError(f"{place} is signed with zero = {spec.zero}; signed codes have none, set it to 0")
    elif spec.bits or spec.zero or spec.signed:
        raise FormatError(f"{place} is a {spec.form} with bits, zero or sign; only codes have them")
    if spec.dtype not in IMAGE_DTYPES or (spec.dtype != "float32" and spec.form != "image"):
        raise FormatError(f"{place} is a {spec.form} of {spec.dtype}; only images have a dtype, float32 or uint8")
    if spec.flat and (spec.form != "stream" or spec.height * spec.width != 1):
        raise FormatError(f"{place} is flat; only a stream of 1 x 1 pixels can be")


def _check_array(program: Program, key: str, blob_bytes: int | None) -> None:
    spec, place = program.arrays[key], f"array {key!r}"
    _check_name(key, "an array")
    if spec.dtype not in ARRAY_DTYPES:
        raise FormatError(f"{place} has dtype {spec.dtype!r}; expected one of {', '.join(ARRAY_DTYPES)}")
    if not 1 <= len(spec.shape) <= 4 or any(not 1 <= size <= MAX_SIZE for size in spec.shape):
        raise FormatError(f"{place} has shape {spec.shape[:8]}; expected 1 to 4 sizes of 1 to {MAX_SIZE}")
    if spec.offset < 0 or spec.offset % BLOB_ALIGNMENT:
        raise FormatError(f"{place} starts at byte {spec.offset}; offsets are multiples of {BLOB_ALIGNMENT}, from 0")
    if blob_bytes is not None and spec.offset + spec.nbytes > blob_bytes:
        raise FormatError(
            f"{place} ends at byte {spec.offset + spec.nbytes}; the blob has {blob_bytes}: it is truncated or another's"
        )


class _Walk:
    """Follows the steps in order, knowing which tensors hold values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.written: set[int] = set()

    def check(self) -> None:
        program = self.program
        for index in program.inputs:
            if self._spec(index, "an input").form != "image":
                raise FormatError(f"input {index} is a {program.tensors[index].form}; a program is given images")
            self._write(index, "the inputs")
        for step in program.steps:
            _check_name(step.name, "a step")
            self._check_step(step)
        if not program.outputs or len(set(program.outputs)) != len(program.outputs):
            raise FormatError(f"outputs are {program.outputs}; a program returns at least one tensor, each once")
        for index in program.outputs:
            if self._spec(index, "an output").form != "stream":
                raise FormatError(f"output {index} is {program.tensors[index].form}; a program returns streams")
        for index, spec in enumerate(program.tensors):
            if index not in self.written:
                raise FormatError(f"tensor {index} ({spec.name}) is never written; drop it or write it")

    def _spec(self, index: int, place: str) -> TensorSpec:
        if not 0 <= index < len(self.program.tensors):
            raise FormatError(f"{place} is tensor {index}; the program has {len(self.program.tensors)}")
        return self.program.tensors[index]

    def _read(self, index: int, place: str) -> TensorSpec:
        spec = self._spec(index, place)
        if index not in self.written:
            raise FormatError(f"{place} reads tensor {index} ({spec.name}) before it is written; order the steps")
        return spec

    def _write(self, index: int, place: str) -> TensorSpec:
        spec = self._spec(index, place)
        if index in self.written:
            raise FormatError(f"{place} writes tensor {index} ({spec.name}) a second time; each is written once")
        self.written.add(index)
        return spec

    def _check_step(self, step: Step) -> None:
        place = f"step {step.name!r}"
        source = self._read(step.input, place)
        if isinstance(step, QuantPackStep):
            _expect_form(source, ("image", "stream"), place)
            self._check_affine(step, source.channels, place)
            shape = (source.height, source.width, source.channels)
        elif isinstance(step, ConvStep):
            shape = self._check_conv(step, source, place)
        elif isinstance(step, LinearStep):
            shape = self._check_linear(step, source, place)
        else:
            shape = _check_pool(step, source, place)
            if source.form == "codes":
                _check_code_pool(step.emit, source, place)
        self._check_emit(step.emit, shape, place, scaled=not (isinstance(step, PoolStep) and source.form == "codes"))

    def _check_affine(self, step: QuantPackStep, channels: int, place: str) -> None:
        if (step.multiplier is None) != (step.bias is None):
            raise FormatError(f"{place} has only one of multiplier and bias; give both or none")
        if step.multiplier is not None and step.bias is not None:
            self._check_array(step.multiplier, "float32", (channels,), place)
            self._check_array(step.bias, "float32", (channels,), place)

    def _check_conv(self, step: ConvStep, source: TensorSpec, place: str) -> Shape:
        _expect_form(source, ("codes",), place)
        for name, pair in (("kernel", step.kernel), ("stride", step.stride), ("dilation", step.dilation)):
            if not all(1 <= size <= MAX_SIZE for size in pair):
                raise FormatError(f"{place} has {name} {pair}; sizes are 1 to {MAX_SIZE}")
        for size, kernel, dilation in zip(step.padding, step.kernel, step.dilation, strict=True):
            if not 0 <= size <= dilation * (kernel - 1) + 1:
                raise FormatError(f"{place} has padding {step.padding}; it is 0 to the extent of the kernel")
        if source.signed and step.padding != (0, 0):
            raise FormatError(f"{place} pads signed codes, which have no code for 0; use unsigned codes or no padding")
        taps = step.kernel[0] * step.kernel[1]
        filters = self._check_weights(step, source, taps, step.groups, place)
        sizes = zip((source.height, source.width), step.kernel, step.stride, step.padding, step.dilation, strict=True)
        height, width = (output_size(*size) for size in sizes)
        if height < 1 or width < 1:
            raise FormatError(f"{place} turns {source.height} x {source.width} pixels into {height} x {width}")
        return height, width, filters

    def _check_linear(self, step: LinearStep, source: TensorSpec, place: str) -> Shape:
        _expect_form(source, ("codes",), place)
        if source.height * source.width != 1:
            raise FormatError(f"{place} reads {source.height} x {source.width} pixels; it needs one, pool first")
        return 1, 1, self._check_weights(step, source, 1, 1, place)

    def _check_weights(
        self, step: ConvStep | LinearStep, source: TensorSpec, taps: int, groups: int, place: str
    ) -> int:
        """Bits, groups, planes, multiplier and bias of a step; returns the number of filters."""
        channels = source.channels
        if not 1 <= step.w_bits <= MAX_BITS:
            raise FormatError(f"{place} has {step.w_bits} weight bits; they are 1 to {MAX_BITS}")
        if groups < 1 or channels % groups:
            raise FormatError(f"{place} has {groups} groups of {channels} channels; groups divide the channels")
        planes = self.program.arrays.get(step.planes)
        filters = planes.shape[1] if planes is not None and len(planes.shape) == 4 else 0
        self._check_array(step.planes, "int32", (step.w_bits, filters, taps, words(channels // groups)), place)
        if filters % groups:
            raise FormatError(f"{place} has {filters} filters in {groups} groups; groups divide the filters")
        if not filters <= step.total_filters <= MAX_SIZE:
            raise FormatError(f"{place} keeps {filters} of {step.total_filters} filters; it cannot keep more than all")
        self._check_array(step.multiplier, "float32", (filters,), place)
        self._check_array(step.bias, "float32", (filters,), place)
        check_accumulator(taps * (channels // groups), step.w_bits, source.bits, place)
        return filters

    def _check_array(self, key: str, dtype: str, shape: tuple[int, ...], place: str) -> None:
        spec = self.program.arrays.get(key)
        if spec is None:
            raise FormatError(f"{place} needs array {key!r}, which the program does not have")
        if spec.dtype != dtype or spec.shape != shape:
            raise FormatError(f"{place}: array {key!r} is {spec.dtype} {spec.shape}; the step needs {dtype} {shape}")

    def _check_emit(self, emit: Emit, shape: Shape, place: str, scaled: bool) -> None:
        if emit.residual is not None:
            residual = self._read(emit.residual, f"{place} (residual)")
            _expect_form(residual, ("stream",), f"{place} (residual)")
            _expect_shape(residual, shape, f"{place} (residual)")
        for name, bound in (("low", emit.low), ("high", emit.high)):
            if bound is not None and not is_float32(bound):
                raise FormatError(f"{place} has {name} = {bound!r}; bounds are exact float32 values, round it first")
        if emit.low is not None and emit.high is not None and emit.low > emit.high:
            raise FormatError(f"{place} clamps to {emit.low} .. {emit.high}; low is at most high")
        if emit.stream is None and not emit.consumers:
            raise FormatError(f"{place} writes nothing; give it a stream or a consumer")
        if emit.stream is not None:
            target = self._write(emit.stream, place)
            _expect_form(target, ("stream",), f"{place} (stream)")
            _expect_shape(target, shape, place)
        for consumer in emit.consumers:
            self._check_consumer(consumer, shape, place, scaled)

    def _check_consumer(self, consumer: Consumer, shape: Shape, place: str, scaled: bool) -> None:
        target = self._write(consumer.tensor, place)
        _expect_form(target, ("codes",), f"{place} (consumer)")
        _expect_shape(target, shape, place)
        written = (consumer.bits, consumer.zero, consumer.signed)
        if written != (target.bits, target.zero, target.signed):
            raise FormatError(
                f"{place} writes codes with (bits, zero, signed) = {written} into tensor {consumer.tensor} "
                f"({target.name}), which has {(target.bits, target.zero, target.signed)}"
            )
        if scaled and not (is_float32(consumer.scale) and consumer.scale > 0):
            raise FormatError(
                f"{place} has scale {consumer.scale!r}; it is positive and exact in float32, round it first"
            )
        if (consumer.pre_scale is None) != (consumer.pre_bias is None):
            raise FormatError(f"{place} has only one of pre_scale and pre_bias; give both or none")
        if consumer.pre_scale is not None and consumer.pre_bias is not None:
            self._check_array(consumer.pre_scale, "float32", (shape[2],), place)
            self._check_array(consumer.pre_bias, "float32", (shape[2],), place)


def _check_pool(step: PoolStep, source: TensorSpec, place: str) -> Shape:
    if step.kind == "mean":
        _expect_form(source, ("stream",), place)
        if step.kernel not in ((1, 1), (source.height, source.width)) or step.padding != (0, 0):
            raise FormatError(f"{place} has kernel {step.kernel}, padding {step.padding}; the mean is global, unpadded")
        return 1, 1, source.channels
    if step.kind != "max":
        raise FormatError(f"{place} has kind {step.kind!r}; expected max or mean")
    _expect_form(source, ("codes", "stream"), place)
    sizes = []
    for size, kernel, stride, padding in zip(
        (source.height, source.width), step.kernel, step.stride, step.padding, strict=True
    ):
        if not (1 <= kernel <= MAX_SIZE and 1 <= stride <= MAX_SIZE and 0 <= padding <= kernel // 2):
            raise FormatError(
                f"{place} has kernel {step.kernel}, stride {step.stride}, padding {step.padding}; "
                "padding is at most half of the kernel"
            )
        sizes.append(output_size(size, kernel, stride, padding, 1))
    if min(sizes) < 1:
        raise FormatError(f"{place} turns {source.height} x {source.width} pixels into {sizes[0]} x {sizes[1]}")
    return sizes[0], sizes[1], source.channels


def _check_code_pool(emit: Emit, source: TensorSpec, place: str) -> None:
    """Codes pass a maximum unchanged: exactly one consumer of the same kind, and nothing else."""
    plain = emit.residual is None and emit.low is None and emit.high is None and emit.stream is None
    if not plain or len(emit.consumers) != 1 or emit.consumers[0].pre_scale is not None or emit.consumers[0].relu:
        raise FormatError(f"{place} is a maximum of codes; it has one plain consumer and nothing else to emit")
    consumer = emit.consumers[0]
    if (consumer.bits, consumer.zero, consumer.signed) != (source.bits, source.zero, source.signed):
        raise FormatError(f"{place} is a maximum of codes; its consumer has the bits, zero and sign of its input")


def _expect_form(spec: TensorSpec, forms: tuple[str, ...], place: str) -> None:
    if spec.form not in forms:
        raise FormatError(f"{place} uses {spec.name}, a tensor of form {spec.form}; expected {' or '.join(forms)}")


def _expect_shape(spec: TensorSpec, shape: Shape, place: str) -> None:
    actual = (spec.height, spec.width, spec.channels)
    if actual != shape:
        raise FormatError(f"{place}: {spec.name} has height, width, channels {actual}; the step computes {shape}")


def is_float32(value: float) -> bool:
    """Whether a finite Python float is exactly a float32 value (so that every parser reads the same number)."""
    if not math.isfinite(value):
        return False
    try:
        return bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False
