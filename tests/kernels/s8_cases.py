"""Layers chosen by reason for the s8 kernels: for the model of the GPU, and for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import one_step
import programs
import torch
from torch import Tensor

from lbs_kernels.gpu.layout import NIBBLE_BITS
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.steps import Emit, NibbleSpec, Program

# K is counted in units of 16 channels under a tap: 8 of them are a chunk, 2 a multiplication.
SHAPES: dict[str, dict[str, Any]] = {
    "smallest": {"shape": (1, 1, 1, 1), "filters": 1, "kernel": (1, 1)},
    "pointwise": {"shape": (3, 9, 5, 64), "filters": 65, "kernel": (1, 1)},  # half a chunk; pixels +-1 of two tiles
    "chunk": {"shape": (1, 8, 8, 128), "filters": 64, "kernel": (1, 1)},  # exactly one; a tile of pixels, of filters
    "strided": {"shape": (2, 9, 9, 96), "filters": 130, "kernel": (1, 1), "stride": (2, 2)},
    "same": {
        "shape": (1, 12, 11, 32),
        "filters": 33,
        "kernel": (3, 3),
        "padding": (1, 1),
    },  # 18 units: 2 chunks and one
    "halved": {"shape": (2, 7, 6, 48), "filters": 20, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "uneven": {"shape": (1, 6, 5, 40), "filters": 13, "kernel": (3, 3), "stride": (3, 2), "padding": (0, 1)},
    "dilated": {"shape": (1, 9, 9, 16), "filters": 70, "kernel": (3, 3), "dilation": (2, 3), "padding": (2, 3)},
    "outside": {"shape": (1, 3, 4, 32), "filters": 5, "kernel": (5, 1), "padding": (5, 1)},  # windows beyond the image
    "pixel": {"shape": (2, 3, 3, 33), "filters": 9, "kernel": (3, 3)},  # one output pixel of each image
    "stem": {"shape": (1, 15, 14, 3), "filters": 24, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "odd": {
        "shape": (1, 5, 7, 77),
        "filters": 127,
        "kernel": (1, 3),
        "padding": (0, 1),
    },  # pruned: a multiple of nothing
    "long": {"shape": (1, 3, 3, 304), "filters": 8, "kernel": (3, 3), "padding": (1, 1)},  # more chunks than any ring
}
# Weights and how the activations read: every width, both grids where there is a choice, zero points, signed codes.
READINGS: dict[str, dict[str, Any]] = {
    "w8": {"w_bits": 8, "grid": "zero"},
    "w8_zero": {"w_bits": 8, "grid": "zero", "zero": 117},
    "w8_odd": {"w_bits": 8, "grid": "odd", "zero": 40},
    "w8_odd_signed": {"w_bits": 8, "grid": "odd", "signed": True},
    "w8_signed": {"w_bits": 8, "grid": "zero", "signed": True},
    "w7_odd": {"w_bits": 7, "grid": "odd", "zero": 255},
    "w4_odd": {"w_bits": 4, "grid": "odd"},
    "w4_zero": {"w_bits": 4, "grid": "zero", "zero": 3},
    "w2_odd_signed": {"w_bits": 2, "grid": "odd", "signed": True},
    "w1": {"w_bits": 1, "grid": "odd", "zero": 128},
}

# The same of activations that are kept as nibbles: every width, zero points, signed codes.
NIBBLES: dict[str, dict[str, Any]] = {
    "w8a4": {"w_bits": 8, "grid": "zero", "a_bits": 4},
    "w8a4_zero": {"w_bits": 8, "grid": "zero", "a_bits": 4, "zero": 11},
    "w8a3_signed": {"w_bits": 8, "grid": "zero", "a_bits": 3, "signed": True},
    "w7a4_odd": {"w_bits": 7, "grid": "odd", "a_bits": 4, "zero": 15},
    "w4a4_odd": {"w_bits": 4, "grid": "odd", "a_bits": 4, "zero": 6},
    "w4a4_odd_signed": {"w_bits": 4, "grid": "odd", "a_bits": 4, "signed": True},
    "w2a2_odd": {"w_bits": 2, "grid": "odd", "a_bits": 2, "zero": 1},
    "w1a1_signed": {"w_bits": 1, "grid": "odd", "a_bits": 1, "signed": True},
}


def random_codes(
    seed: int, shape: tuple[int, ...], filters: int, kernel: tuple[int, int], w_bits: int, a_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, H, W, C], with both ends among them, and weight planes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 1 << a_bits, shape, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 1 << w_bits, (filters, *kernel, shape[-1]), generator=generator, dtype=torch.uint8)
    x.view(-1)[::7] = (1 << a_bits) - 1
    codes.view(-1)[::5] = (1 << w_bits) - 1
    codes.view(-1)[::11] = 0
    return x, pack_weights(codes, w_bits)


def layer(name: str, reading: str = "w8", seed: int = 0, batch: int | None = None) -> one_step.OneStep:
    """A convolution of `SHAPES` read as one of `READINGS` or `NIBBLES`, whose stream is float32(acc)."""
    window = dict(SHAPES[name])
    shape, filters = window.pop("shape"), window.pop("filters")
    how = {**READINGS, **NIBBLES}[reading].copy()
    w_bits, a_bits = how.pop("w_bits"), how.pop("a_bits", 8)
    shape = shape if batch is None else (batch, *shape[1:])
    x, planes = random_codes(seed, shape, filters, window["kernel"], w_bits, a_bits)
    made = one_step.conv(x, planes, a_bits=a_bits, **window, **how)
    return replace(made, program=as_nibbles(made.program))


def residuals(filters: int, stream_dtype: str, bits: int = 8) -> tuple[Program, Tensor]:
    """A convolution that adds a stream, clamps, stores and writes codes of all kinds, behind one that makes it."""
    b = programs.Builder(filters, stream_dtype)
    image = b.image(40, 6, 5)
    codes = b.consumer((6, 5, 40), bits, zero=31 >> 8 - bits)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, filters)
    residual = b.stream(shape)
    b.conv(codes.tensor, Emit(stream=residual), filters, w_bits=4)
    consumers = (
        b.consumer(shape, 8, zero=90, norm=True),
        b.consumer(shape, 2, norm=True, relu=True),
        b.consumer(shape, 4, signed=True),
        b.consumer(shape, 4, signed=True, relu=True, norm=True),
        b.consumer(shape, 8, zero=3, relu=True),
        b.consumer(shape, 7, zero=11, norm=True),
    )
    emit = Emit(residual=residual, low=-0.7, high=1.5, stream=b.stream(shape, output=True), consumers=consumers)
    b.conv(codes.tensor, emit, filters, w_bits=8, grid="zero")
    return b.build()


def coded_residuals(filters: int) -> tuple[Program, Tensor]:
    """A convolution that adds codes with a zero, whose own codes stand for the value of the consumers behind them."""
    b = programs.Builder(filters)
    image = b.image(40, 6, 5)
    codes = b.consumer((6, 5, 40), 8, zero=31)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, filters)
    held = b.consumer(shape, 8, zero=77)
    b.conv(codes.tensor, Emit(consumers=(held,)), filters, w_bits=4)
    before = b.consumer(shape, 2)
    coded = b.consumer(shape, 8, zero=50, stands=True)
    behind = (b.consumer(shape, 4), b.consumer(shape, 8, zero=9, norm=True))
    emit = Emit(residual=held.tensor, residual_step=b.step(held.scale), low=-0.7, stream=b.stream(shape, output=True))
    emit = replace(emit, consumers=(before, coded, *behind))
    b.conv(codes.tensor, emit, filters, w_bits=8, grid="zero")
    return b.build()


def deep(blocks: int, channels: int = 64, size: int = 14, bits: int = 8) -> tuple[Program, Tensor]:
    """Residual blocks of two convolutions, as in networks: the memory of codes is written again two steps later."""
    b = programs.Builder(blocks, "float16")
    image = b.image(channels, size, size)
    shape = (size, size, channels)
    codes, stream = b.consumer(shape, bits), b.stream(shape)
    b.quantize(image, Emit(stream=stream, consumers=(codes,)))
    for block in range(blocks):
        last = block == blocks - 1
        between, added = b.consumer(shape, bits), b.stream(shape, output=last)
        b.conv(codes.tensor, Emit(low=0.0, consumers=(between,)), channels, w_bits=4)
        # The stream grows from block to block; a norm brings it back.
        behind = () if last else (b.consumer(shape, bits, norm=True, top=4.0),)
        b.conv(
            between.tensor,
            Emit(residual=stream, low=-1.0, high=3.0, stream=added, consumers=behind),
            channels,
            w_bits=4,
        )
        codes, stream = behind[0] if behind else codes, added
    return b.build()


def shortcuts(
    blocks: int, channels: int = 64, size: int = 28, bits: int = 8, between: int = 1
) -> tuple[Program, Tensor]:
    """Residual blocks that halve their size, each with a convolution in its shortcut, in front of the others: `between`
    of them and the one that adds it.
    """
    b = programs.Builder(blocks, "float16")
    codes = b.consumer((size, size, channels), bits)
    b.quantize(b.image(channels, size, size), Emit(consumers=(codes,)))
    for block in range(blocks):
        filters, last = 2 * channels, block == blocks - 1
        window = {"kernel": (1, 1), "stride": (2, 2), "padding": (0, 0)}
        shape = b.conv_shape(codes.tensor, filters, **window)
        added = b.stream(shape)
        b.conv(codes.tensor, Emit(stream=added), filters, w_bits=4, **window)
        for place in range(between):
            source, codes = codes, b.consumer(shape, bits)
            stride = (2, 2) if place == 0 else (1, 1)
            b.conv(source.tensor, Emit(low=0.0, consumers=(codes,)), filters, w_bits=4, stride=stride)
        source, codes, channels = codes, b.consumer(shape, bits), filters
        emit = Emit(residual=added, low=0.0, stream=b.stream(shape, output=True) if last else None, consumers=(codes,))
        b.conv(source.tensor, emit, filters, w_bits=4)
    return b.build()


def as_nibbles(program: Program) -> Program:
    """The program whose codes of at most 4 bits are all kept as nibbles."""
    tensors = (NibbleSpec(**vars(spec)) if 1 <= spec.bits <= NIBBLE_BITS else spec for spec in program.tensors)
    return replace(program, tensors=tuple(tensors))


def all_as_bytes(program: Program) -> Program:
    """The program whose codes are all kept as bytes, whatever their width."""
    tensors = (replace(spec, bits=8) if spec.form == "codes" else spec for spec in program.tensors)
    return replace(program, tensors=tuple(tensors))
