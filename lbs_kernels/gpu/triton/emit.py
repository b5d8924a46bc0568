"""Steps 3-6 of the epilogue, fused into every Triton kernel that produces floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbs_kernels.gpu.layout import kept, pixel_elements
from lbs_kernels.gpu.triton.activation import activate
from lbs_kernels.gpu.triton.common import (
    RINT_MAGIC,
    RINT_MAGIC_BITS,
    at_least,
    at_most,
    fma,
    load_stream,
    store_nibbles,
    store_planes,
    store_stream,
)
from lbs_kernels.program.steps import Consumer, Emit, Program


class ConsumerMeta(NamedTuple):
    """What the compiler knows of one code tensor that a kernel writes."""

    bits: int
    kept: str  # as planes, bytes or nibbles
    zero: int
    signed: bool
    relu: bool
    pre_norm: bool
    stands: bool  # for y, of those behind it


class EmitMeta(NamedTuple):
    """What the compiler knows of steps 3-6; everything here selects code, nothing is read at run time."""

    residual: bool  # of a stream
    coded: int | None  # the zero of a residual of codes
    low: float | None
    high: float | None
    stream: bool
    stream_dtype: str
    consumers: tuple[ConsumerMeta, ...]
    activation: str | None  # of these two at most one: in front of gate and residual,
    activation_behind: str | None  # or behind them
    gate: bool
    folds: bool  # low and high go into the bounds of the codes, as nothing else sees what they bound


class ConsumerTarget(NamedTuple):
    """Where one code tensor goes: planes int32 [M, bits, CW], biased bytes int8 or nibbles int32 [M, pitch]."""

    codes: Tensor
    pitch: int
    scale: float
    pre_scale: Tensor | None
    pre_bias: Tensor | None
    step: float


class Coded(NamedTuple):
    """A residual of codes: biased bytes int8 [M, pitch]."""

    codes: Tensor
    pitch: int
    step: float


class Gate(NamedTuple):
    """A stream [N, C] that every pixel of an image is multiplied with."""

    stream: Tensor  # not `values`, which a tuple has in kernels
    pixels: int  # of an image


class EmitTarget(NamedTuple):
    """Pointers of steps 3-6. Streams are [M, C]; bfloat16 is passed as int16, so that the rounding is ours."""

    residual: Tensor | None
    coded: Coded | None
    stream: Tensor | None
    consumers: tuple[ConsumerTarget, ...]
    gate: Gate | None
    value: Tensor | float  # alpha of elu, slope of leaky_relu, slopes float32 [C] of prelu


@triton.jit
def bounded(t, scale, META: tl.constexpr, INDEX: tl.constexpr):
    """t between the bounds of its codes, and those of y and u where nothing has bounded these.

    A positive scale and a sum, both rounded, leave numbers in order, so that a bound of y is one of t. All of them
    together are the two numbers that -inf and inf become; a NaN becomes the first.
    """
    CONSUMER: tl.constexpr = META.consumers[INDEX]
    LEVELS: tl.constexpr = (1 << CONSUMER.bits) - 1
    LEAST: tl.constexpr = -1.0 * CONSUMER.zero
    MOST: tl.constexpr = 1.0 * (LEVELS - CONSUMER.zero)
    LOW: tl.constexpr = META.low
    HIGH: tl.constexpr = META.high
    least, most = scale * float("-inf"), scale * float("inf")
    if LOW is not None:
        least = scale * LOW
    if HIGH is not None:
        most = scale * HIGH
        least = at_most(least, most)
    if CONSUMER.relu:
        least, most = at_least(least, 0.0), at_least(most, 0.0)
    if CONSUMER.signed:
        least, most = least + LEVELS / 2, most + LEVELS / 2
    least = at_most(at_least(least, LEAST), MOST)
    most = at_most(at_least(most, LEAST), MOST)
    return at_most(at_least(t, least), most)


@triton.jit
def coded(y, column, columns, target, META: tl.constexpr, INDEX: tl.constexpr):
    """t of step 6 for consumer INDEX, whose code is rint(t) + zero, between the bounds of the codes.

    Those are integers, so clamping before rint gives what clamping after it gives, and rint stays in range.
    """
    CONSUMER: tl.constexpr = META.consumers[INDEX]
    LEVELS: tl.constexpr = (1 << CONSUMER.bits) - 1
    u = y
    if CONSUMER.pre_norm:
        column_mask = column < columns
        pre_scale = tl.load(target.pre_scale + column, mask=column_mask, other=0.0)
        pre_bias = tl.load(target.pre_bias + column, mask=column_mask, other=0.0)
        u = fma(u, pre_scale[None, :], pre_bias[None, :])
    if CONSUMER.relu and not META.folds:
        u = at_least(u, 0.0)
    t = u * target.scale
    if CONSUMER.signed:
        t = t + LEVELS / 2
    if META.folds:
        t = bounded(t, target.scale, META, INDEX)
    else:
        t = at_most(at_least(t, -1.0 * CONSUMER.zero), 1.0 * (LEVELS - CONSUMER.zero))
    return t


@triton.jit
def biased_bytes(t, ZERO: tl.constexpr):
    """int8 q - 128 of the codes q = rint(t) + ZERO.

    The lowest byte of the float is that of the code. An even number in the constant moves it, and no tie.
    """
    EVEN: tl.constexpr = (ZERO - 128) // 2 * 2
    MAGIC: tl.constexpr = RINT_MAGIC + EVEN
    byte = (t + MAGIC).to(tl.int32, bitcast=True)
    if ZERO % 2:
        byte += 1
    return byte.to(tl.int8)


@triton.jit
def store_codes(y, row, row_mask, first, columns, targets, META: tl.constexpr, INDEX: tl.constexpr):
    """Step 6 for consumer INDEX: q = clamp(rint(u * scale (+ n / 2)) + zero, 0, n), written as codes are kept; returns
    y, or what codes with a step stand for.
    """
    CONSUMER: tl.constexpr = META.consumers[INDEX]
    ZERO: tl.constexpr = CONSUMER.zero
    target = targets[INDEX]
    column = first + tl.arange(0, y.shape[1])
    t = coded(y, column, columns, target, META, INDEX)
    if CONSUMER.kept == "bytes":
        mask = row_mask[:, None] & (column < columns)[None, :]
        place = target.codes + row[:, None] * target.pitch + column[None, :]
        tl.store(place, biased_bytes(t, ZERO), mask=mask)
    if CONSUMER.stands or CONSUMER.kept != "bytes":
        codes = (t + RINT_MAGIC).to(tl.int32, bitcast=True) - RINT_MAGIC_BITS + CONSUMER.zero
        if CONSUMER.kept == "planes":
            store_planes(target.codes, codes, row, row_mask, first, columns, CONSUMER.bits)
        if CONSUMER.kept == "nibbles":
            store_nibbles(target.codes, target.pitch, codes, row, row_mask, first)
    if CONSUMER.stands:
        y = (codes - CONSUMER.zero).to(tl.float32) * target.step
    return y


@triton.jit
def activated(y, column, columns, target, KIND: tl.constexpr):
    """The activation KIND of a tile; prelu loads the slopes of its channels."""
    if KIND == "prelu":
        slope = tl.load(target.value + column, mask=column < columns, other=0.0)
        y = activate(y, slope[None, :], KIND)
    else:
        y = activate(y, target.value, KIND)
    return y


@triton.jit
def emit(y, row, row_mask, first, columns, target, META: tl.constexpr):
    """Steps 3-6 of the epilogue for a tile.

    y: float32 [BLOCK_M, BLOCK_O] of pixels `row` [BLOCK_M] (masked) and channels first .. first + BLOCK_O - 1, of which
    those below `columns` exist.
    """
    # Triton 3.5 takes constexpr arguments from named locals only, not from fields of one.
    LOW: tl.constexpr = META.low
    HIGH: tl.constexpr = META.high
    DTYPE: tl.constexpr = META.stream_dtype
    column = first + tl.arange(0, y.shape[1])
    mask = row_mask[:, None] & (column < columns)[None, :]
    index = row[:, None] * columns + column[None, :]
    BEFORE: tl.constexpr = META.activation
    BEHIND: tl.constexpr = META.activation_behind
    if BEFORE is not None:
        y = activated(y, column, columns, target, BEFORE)
    if META.gate:
        image = row // target.gate.pixels
        y = y * load_stream(target.gate.stream + (image[:, None] * columns + column[None, :]), mask, DTYPE)
    if META.residual:
        y = y + load_stream(target.residual + index, mask, DTYPE)
    if META.coded is not None:
        ZERO: tl.constexpr = META.coded
        place = row[:, None] * target.coded.pitch + column[None, :]
        codes = tl.load(target.coded.codes + place, mask=mask, other=0).to(tl.int32)
        y = y + (codes + (128 - ZERO)).to(tl.float32) * target.coded.step
    if BEHIND is not None:
        y = activated(y, column, columns, target, BEHIND)
    if LOW is not None and not META.folds:
        y = at_least(y, LOW)
    if HIGH is not None and not META.folds:
        y = at_most(y, HIGH)
    if META.stream:
        y = store_stream(target.stream + index, y, mask, DTYPE)
    for i in tl.static_range(len(META.consumers)):
        y = store_codes(y, row, row_mask, first, columns, target.consumers, META, i)


def kernel_view(stream: Tensor) -> Tensor:
    """A stream as kernels take it: bfloat16 as its int16 bit patterns."""
    return stream.view(torch.int16) if stream.dtype is torch.bfloat16 else stream


def bind_emit(
    emit: Emit, program: Program, arrays: Mapping[str, Tensor], buffers: Mapping[int, Tensor]
) -> tuple[EmitTarget, EmitMeta]:
    """Pointers and compile-time facts of `emit`.

    Args:
        emit, program: what to write.
        arrays: the program's arrays on the device, by key.
        buffers: tensors on the device in their GPU form, by index.
    """

    def pointers(consumer: Consumer) -> ConsumerTarget:
        pitch = pixel_elements(program.tensors[consumer.tensor])
        scale, bias = (None if key is None else arrays[key] for key in (consumer.pre_scale, consumer.pre_bias))
        return ConsumerTarget(buffers[consumer.tensor], pitch, consumer.scale, scale, bias, consumer.step or 0.0)

    def facts(consumer: Consumer) -> ConsumerMeta:
        pre_norm = consumer.pre_scale is not None
        stands = consumer.step is not None
        form = kept(program.tensors[consumer.tensor])
        return ConsumerMeta(consumer.bits, form, consumer.zero, consumer.signed, consumer.relu, pre_norm, stands)

    written = emit.consumers[0].tensor if emit.stream is None else emit.stream
    pixels = program.tensors[written].height * program.tensors[written].width
    activation = emit.activation
    kind = None if activation is None else activation.kind
    first = activation is not None and activation.first
    value: Tensor | float = 0.0
    if activation is not None:
        value = activation.value if activation.slope is None else arrays[activation.slope]
    coded = None
    if emit.residual is not None and emit.residual_step is not None:
        coded = Coded(buffers[emit.residual], pixel_elements(program.tensors[emit.residual]), emit.residual_step)
    target = EmitTarget(
        None if emit.residual is None or coded is not None else kernel_view(buffers[emit.residual]),
        coded,
        None if emit.stream is None else kernel_view(buffers[emit.stream]),
        tuple(pointers(consumer) for consumer in emit.consumers),
        None if emit.gate is None else Gate(kernel_view(buffers[emit.gate]), pixels),
        value,
    )
    meta = EmitMeta(
        emit.residual is not None and coded is None,
        None if coded is None else program.tensors[emit.residual or 0].zero,
        emit.low,
        emit.high,
        emit.stream is not None,
        program.stream_dtype,
        tuple(facts(consumer) for consumer in emit.consumers),
        kind if first else None,
        None if first else kind,
        emit.gate is not None,
        emit.stream is None and not any(k.pre_scale is not None or k.step is not None for k in emit.consumers),
    )
    return target, meta
