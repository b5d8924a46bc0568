"""A convolution and the maximum that alone reads its floats, computed in bands of rows: against the reference on every
instruction set.

What may go wrong is where bands begin and end: windows that reach into the padding or the band before, or leave rows
out, rows that fill no whole vectors, a last band that is shorter, and threads that begin with a band of their own.
"""

from __future__ import annotations

import pytest
from programs import Builder
from test_native_program import ISAS, check
from torch import Tensor

from lbs_kernels.program.steps import Emit, Program

WINDOWS = {  # kernel, stride, padding
    "3x3, stride 2": ((3, 3), (2, 2), (1, 1)),
    "2x2, stride 2": ((2, 2), (2, 2), (0, 0)),
    "3x3, stride 1": ((3, 3), (1, 1), (1, 1)),
    "5x3, stride 1x2": ((5, 3), (1, 2), (2, 0)),
    "1x2, stride 3x1": ((1, 2), (3, 1), (0, 0)),
}


# Filters that end within a group; rows that are whole vectors or not, and that end in a band.
SIZES = (((51, 64), 65), ((70, 50), 48), ((61, 47), 52))


def net(window: str, size: tuple[int, int], filters: int, readers: int = 1) -> tuple[Program, Tensor]:
    """Image, codes, a 3x3 convolution that writes floats, their maximum as floats and codes, what reads the codes."""
    b = Builder(3)
    image = b.image(3, *size)
    codes = b.consumer((*size, 3), 8)
    b.quantize(image, Emit(consumers=(codes,)))
    stem = b.stream((*size, filters))
    b.conv(codes.tensor, Emit(low=0.0, stream=stem), filters, w_bits=8)
    shape = b.conv_shape(stem, filters, *WINDOWS[window])
    seen = b.consumer(shape, 4)
    b.pool(stem, Emit(stream=b.stream(shape, output=True), consumers=(seen,)), "max", *WINDOWS[window])
    b.conv(seen.tensor, Emit(stream=b.stream((*shape[:2], 4), output=True)), 4, w_bits=4)
    if readers > 1:
        b.pool(stem, Emit(stream=b.stream((1, 1, filters), output=True)), "mean")
    return b.build()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", WINDOWS)
def test_bands(window: str, isa: str) -> None:
    for size, filters in SIZES:
        check(*net(window, size, filters), isa, batches=(1, 2), threads=(1, 3))


@pytest.mark.parametrize("isa", ISAS)
def test_floats_that_others_read_are_whole(isa: str) -> None:
    check(*net("3x3, stride 2", (51, 64), 48, readers=2), isa, batches=(1,), threads=(1, 2))


@pytest.mark.parametrize("isa", ISAS)
def test_what_bands_read_is_not_written_to(isa: str) -> None:
    """The maximum's codes have the layout of those that the convolution reads, with rows that the next band reads too;
    and codes of a second image could take the place of the first's while another thread still reads them.
    """
    b = Builder(4)
    images = [b.image(3, 56, 56), b.image(3, 56, 56)]
    window = {"kernel": (5, 5), "padding": (2, 2)}
    codes = [b.consumer((56, 56, 64), 8), b.consumer((56, 56, 64), 8)]
    for image, made in zip(images, codes, strict=True):
        first = b.consumer((56, 56, 3), 8)
        b.quantize(image, Emit(consumers=(first,)))
        b.conv(first.tensor, Emit(low=0.0, consumers=(made,)), 64, w_bits=4, kernel=(1, 1), padding=(0, 0))
        stem = b.stream((56, 56, 64))
        b.conv(made.tensor, Emit(low=0.0, stream=stem), 64, w_bits=8, **window)  # type: ignore[arg-type]
        seen = b.consumer((56, 56, 64), 8)
        b.pool(stem, Emit(consumers=(seen,)), "max", *WINDOWS["3x3, stride 1"])
        b.conv(seen.tensor, Emit(stream=b.stream((56, 56, 4), output=True)), 4, w_bits=4, **window)  # type: ignore[arg-type]
    check(*b.build(), isa, batches=(1, 2), threads=(1, 3))


@pytest.mark.parametrize("isa", ISAS)
def test_strides_that_are_never_taken(isa: str) -> None:
    b = Builder(6)
    image = b.image(3, 64, 1024)
    codes = b.consumer((64, 1024, 3), 8)
    b.quantize(image, Emit(consumers=(codes,)))
    stem = b.stream((64, 1024, 8))
    b.conv(codes.tensor, Emit(low=0.0, stream=stem), 8, w_bits=8)
    window = ((2, 2), (1 << 24, 1), (0, 0))
    b.pool(stem, Emit(stream=b.stream(b.conv_shape(stem, 8, *window), output=True)), "max", *window)
    check(*b.build(), isa, batches=(1,), threads=(1, 2))
