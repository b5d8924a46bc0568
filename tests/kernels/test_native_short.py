"""Sums of few products, whose codes are made as they are summed: against the reference on every instruction set.

What may go wrong is where vectors end (rows that fill none, several, one and a part), how the reader of the codes keeps
them (rows with padding, columns apart, one row of pixels), where bounds and zeros lie, and what is not served: numbers
no integer holds, other epilogues, longer sums.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from programs import Builder, random_inputs
from test_native_program import ISAS, check, run_native
from torch import Tensor

from lbs_kernels.program.steps import Emit, Program
from lbs_kernels.run.reference import ReferenceRunner

# (channels, filters, window): four channels a step, 32 steps at most, 16 of depthwise windows; 7 channels and 7 filters
# end within a group.
LAYERS = {
    "1x1, one step": (3, 7, {"kernel": (1, 1), "padding": (0, 0)}),
    "1x1, 32 steps": (128, 12, {"kernel": (1, 1), "padding": (0, 0)}),
    "1x1, 33 steps": (132, 12, {"kernel": (1, 1), "padding": (0, 0)}),
    "1x1, stride 2": (7, 16, {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)}),
    "3x3 of an image": (3, 20, {"stride": (2, 2)}),
    "3x3, 27 steps": (10, 8, {}),
    "4x4": (2, 5, {"kernel": (4, 4), "padding": (2, 1)}),
    "depthwise": (10, 10, {"groups": 10}),
    "depthwise, stride 2": (12, 12, {"groups": 12, "stride": (2, 2)}),
    "depthwise 5x5": (8, 8, {"groups": 8, "kernel": (5, 5), "padding": (2, 2)}),
    "groups of 4": (12, 24, {"groups": 3, "dilation": (2, 1), "padding": (2, 1)}),
}
READERS = {
    "3x3": {"padding": (1, 1)},
    "stride 2": {"padding": (1, 1), "stride": (2, 2)},
    "stride 3": {"padding": (1, 1), "stride": (3, 3)},
    "1x1": {"kernel": (1, 1), "padding": (0, 0)},
}


def net(
    layer: str,
    reader: str,
    size: tuple[int, int],
    *,
    bits: tuple[int, int, int] = (8, 8, 8),
    zeros: tuple[int, int] = (0, 0),
    low: float | None = 0.0,
    high: float | None = None,
    relu: bool = False,
    grid: str = "zero",
    largest: float = 1.0,
) -> tuple[Program, Tensor]:
    """Image, codes of bits[1], the layer of bits[0] weights, codes of bits[2], and what reads them."""
    channels, filters, window = LAYERS[layer]
    b = Builder(5)
    image = b.image(channels, *size)
    codes = b.consumer((*size, channels), bits[1], zero=zeros[0])
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, filters, **{key: value for key, value in window.items() if key != "groups"})
    made = b.consumer(shape, bits[2], zero=zeros[1], relu=relu)
    emit = Emit(low=low, high=high, consumers=(made,))
    b.conv(codes.tensor, emit, filters, w_bits=bits[0], grid=grid, **window)  # type: ignore[arg-type]
    b.arrays[b.steps[-1].multiplier][-1] *= largest  # type: ignore[union-attr]
    y = b.stream(b.conv_shape(made.tensor, 4, **READERS[reader]), output=True)
    b.conv(made.tensor, Emit(stream=y), 4, w_bits=4, **READERS[reader])
    return b.build()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_and_their_readers(layer: str, reader: str, isa: str) -> None:
    """Rows of 7, 14, 28 and 56 pixels are what networks have; 16 and 33 fill vectors, and one more."""
    for size in ((7, 7), (9, 14), (3, 28), (2, 56), (5, 16), (4, 33)):
        check(*net(layer, reader, size), isa, batches=(1, 3), threads=(1, 3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", ["1x1, 32 steps", "3x3 of an image", "depthwise"])
@pytest.mark.parametrize("grid", ["odd", "zero"])
@pytest.mark.parametrize("bits", [(8, 8, 8), (8, 8, 4), (4, 4, 4), (4, 8, 2), (2, 2, 8), (7, 7, 1)])
def test_bits_and_bounds(bits: tuple[int, int, int], grid: str, layer: str, isa: str) -> None:
    """Zeros of what is read and made, and bounds at, between and beyond them."""
    most = (1 << bits[1]) - 1, (1 << bits[2]) - 1
    for zeros in ((0, 0), (most[0] // 3, 0), (0, most[1] // 2), (1, most[1])):
        for low, high, relu in ((0.0, None, False), (None, None, False), (-0.25, 1.125, False), (None, None, True)):
            program, blob = net(layer, "3x3", (5, 19), bits=bits, zeros=zeros, low=low, high=high, relu=relu, grid=grid)
            check(program, blob, isa, batches=(1,), threads=(1,), share=0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", ["1x1, 32 steps", "depthwise"])
@pytest.mark.parametrize("largest", [1e3, 1e6, 1e12, -1e30])
def test_numbers_that_no_integer_holds(largest: float, layer: str, isa: str) -> None:
    """The last filter's multiplier: y in code units stays below 2^31, passes it, and is infinite as a product."""
    program, blob = net(layer, "3x3", (5, 19), low=None, zeros=(0, 100), largest=largest)
    inputs = random_inputs(program, 2, seed=3)
    expected: dict[int, Tensor] = {}
    ReferenceRunner(program, blob).run(inputs, expected)
    _, trace = run_native(program, blob, inputs, isa, 1, traced=True)
    for index, native in trace.items():
        assert torch.equal(native, expected[index])
    last = expected[program.steps[1].emit.consumers[0].tensor][..., -1]
    assert {0, 255} <= set(last.flatten().tolist())


@pytest.mark.parametrize("isa", ISAS)
def test_one_channel_that_is_thinned(isa: str) -> None:
    """As many groups as channels, one; another reader pads the codes, and knows no stride."""
    b = Builder(2)
    image = b.image(1, 10, 13)
    codes = b.consumer((10, 13, 1), 8)
    b.quantize(image, Emit(consumers=(codes,)))
    window = {"kernel": (1, 1), "padding": (0, 0), "stride": (3, 3)}
    made = b.consumer(b.conv_shape(codes.tensor, 1, **window), 8)
    b.conv(codes.tensor, Emit(low=0.0, consumers=(made,)), 1, w_bits=8, grid="zero", **window)  # type: ignore[arg-type]
    for tensor in (codes.tensor, made.tensor):
        y = b.stream(b.conv_shape(tensor, 3, padding=(1, 1)), output=True)
        b.conv(tensor, Emit(stream=y), 3, w_bits=4, padding=(1, 1))
    check(*b.build(), isa, batches=(1, 3), threads=(1, 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zeros", [(0, 0), (77, 5), (200, 0)])
def test_two_readers(zeros: tuple[int, int], reader: str, isa: str) -> None:
    """Codes that stand for the value, and fewer bits made of them, with a residual of codes and without: the first in
    one row of pixels, the others as their reader keeps them; 13 filters end within a group.
    """
    for size, filters in (((7, 7), 16), ((9, 14), 13), ((3, 28), 20), ((5, 16), 8), ((4, 33), 12)):
        for coded in (False, True):
            b = Builder(filters)
            shape = (*size, filters)
            image = b.image(filters, *size)
            codes, held = b.consumer(shape, 8), b.consumer(shape, 8, zero=90, top=2.0)
            b.quantize(image, Emit(consumers=(codes, held)))
            wide = b.consumer(shape, 8, zero=zeros[0], stands=True)
            narrow = b.consumer(shape, 4, zero=zeros[1])
            emit = Emit(low=None if zeros[0] else 0.0, consumers=(wide, narrow))
            if coded:
                emit = replace(emit, residual=held.tensor, residual_step=b.step(held.scale))
            b.conv(codes.tensor, emit, filters, w_bits=8, kernel=(1, 1), padding=(0, 0), grid="zero")
            for tensor, window in ((wide.tensor, READERS["1x1"]), (narrow.tensor, READERS[reader])):
                y = b.stream(b.conv_shape(tensor, 4, **window), output=True)
                b.conv(tensor, Emit(stream=y), 4, w_bits=4, **window)
            check(*b.build(), isa, batches=(1, 3), threads=(1, 3))
