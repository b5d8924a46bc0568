"""The depthwise kernel against the reference on every instruction set, with shapes chosen for its rows and vectors."""

from __future__ import annotations

import pytest
import torch
from programs import Builder, one_conv, random_inputs
from test_native_program import ISAS, check, run_native
from torch import Tensor

from lbs_kernels.program.steps import Emit, Program
from lbs_kernels.run.reference import ReferenceRunner

# Rows shorter than a vector, as long, one longer; vectors that span rows; odd maps under strides; kernels of one and of
# several quads of taps; and windows the kernel leaves to the dense tiles.
SHAPES = {
    "one pixel": {"channels": 5, "size": (1, 1)},
    "one channel": {"channels": 1, "size": (6, 9)},
    "whole groups": {"channels": 8, "size": (4, 16)},
    "rows of 7": {"channels": 12, "size": (7, 7)},
    "rows of 17, a channel over": {"channels": 9, "size": (5, 17)},
    "rows of 33, three channels over": {"channels": 7, "size": (3, 33)},
    "many rows": {"channels": 4, "size": (70, 5)},
    "rows longer than what is kept": {"channels": 3, "size": (3, 300)},
    "one column": {"channels": 6, "size": (40, 1)},
    "stride 2, odd map": {"channels": 6, "size": (15, 13), "stride": (2, 2)},
    "stride 2, even map": {"channels": 6, "size": (12, 34), "stride": (2, 2)},
    "stride 2, no padding": {"channels": 4, "size": (9, 10), "stride": (2, 2), "padding": (0, 0)},
    "stride of rows": {"channels": 4, "size": (11, 18), "stride": (3, 1)},
    "stride of columns": {"channels": 4, "size": (6, 35), "stride": (1, 3)},
    "stride beyond the kernel": {"channels": 4, "size": (16, 19), "stride": (5, 4)},
    "5x5": {"channels": 10, "size": (9, 14), "kernel": (5, 5), "padding": (2, 2)},
    "5x5, stride 2": {"channels": 10, "size": (14, 15), "kernel": (5, 5), "padding": (2, 2), "stride": (2, 2)},
    "5x5, stride 3": {"channels": 5, "size": (17, 16), "kernel": (5, 5), "padding": (2, 2), "stride": (3, 3)},
    "9x9": {"channels": 6, "size": (10, 20), "kernel": (9, 9), "padding": (4, 4)},
    "1x1": {"channels": 6, "size": (5, 9), "kernel": (1, 1), "padding": (0, 0)},
    "1x7 and 4x2": {"channels": 6, "size": (6, 21), "kernel": (1, 7), "padding": (0, 3)},
    "even kernel": {"channels": 6, "size": (9, 11), "kernel": (4, 2), "padding": (1, 1)},
    "dilated": {"channels": 6, "size": (12, 21), "dilation": (2, 3), "padding": (2, 3)},
    "dilated, stride 2": {"channels": 6, "size": (13, 22), "dilation": (3, 3), "padding": (3, 3), "stride": (2, 2)},
    "dilated 5x5": {
        "channels": 3, "size": (12, 19), "kernel": (5, 5), "dilation": (2, 2), "padding": (4, 4)
    },
    "wide padding": {"channels": 5, "size": (4, 4), "padding": (3, 3)},
    "more quads than are kept": {"channels": 2, "size": (24, 24), "kernel": (23, 23), "padding": (11, 11)},
    "two filters each": {"channels": 6, "filters": 12, "size": (8, 9)},
}  # fmt: skip


def depthwise(seed: int, *, w_bits: int, a_bits: int, channels: int, **changes: object) -> tuple[Program, Tensor]:
    changes = {"filters": channels, **changes}
    return one_conv(seed, channels=channels, groups=channels, w_bits=w_bits, a_bits=a_bits, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, isa: str) -> None:
    for w_bits, a_bits, zero, grid in ((4, 4, 0, "odd"), (8, 8, 101, "odd"), (8, 8, 3, "zero")):
        program, blob = depthwise(3, w_bits=w_bits, a_bits=a_bits, zero=zero, grid=grid, **SHAPES[name])  # type: ignore[arg-type]
        check(program, blob, isa, batches=(1, 3), threads=(1, 2, 3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("a_bits", range(1, 9))
def test_every_pair_of_bits(a_bits: int, isa: str) -> None:
    for w_bits in range(1, 9):
        for grid in ("odd", "zero"):
            program, blob = depthwise(1, channels=5, size=(6, 7), w_bits=w_bits, a_bits=a_bits, out_bits=8, grid=grid)
            check(program, blob, isa, batches=(1,), threads=(1,))
        if a_bits > 1:
            signed = {"signed": True, "padding": (0, 0)}
            program, blob = depthwise(2, channels=6, size=(5, 19), w_bits=w_bits, a_bits=a_bits, **signed)
            check(program, blob, isa, batches=(1,), threads=(1,))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("grid", ["odd", "zero"])
@pytest.mark.parametrize("bits", [7, 8])
def test_the_largest_products(bits: int, grid: str, isa: str) -> None:
    """All codes and weights at one end: pairs of products that leave 16 bits, or just do not."""
    program, blob = depthwise(0, channels=6, size=(4, 20), w_bits=bits, a_bits=8, grid=grid)
    planes = program.array(blob, next(key for key in program.arrays if key.startswith("planes")))
    for filled in (0, 1):
        planes.fill_(filled)
        for value in (1e9, -1e9):
            inputs = [torch.full((1, 6, 4, 20), value)]
            expected: dict[int, Tensor] = {}
            ReferenceRunner(program, blob).run(inputs, expected)
            _, trace = run_native(program, blob, inputs, isa, 1, traced=True)
            for index, native in trace.items():
                assert torch.equal(native, expected[index])


Size = tuple[int, int]


def inverted_residual(size: Size, stride: int, low: float | None, zero: int) -> tuple[Program, Tensor]:
    """Expand, depthwise, project, all bounded as a ReLU6 is or from below not at all; only codes in between."""
    b = Builder(7)
    image = b.image(5, *size)
    codes = b.consumer((*size, 5), 8, zero=zero)
    b.quantize(image, Emit(consumers=(codes,)))
    wide = b.consumer((*size, 22), 8, zero=zero)
    bounds = Emit(low=low, high=1.5, consumers=(wide,))
    b.conv(codes.tensor, bounds, 22, w_bits=8, kernel=(1, 1), padding=(0, 0), grid="zero")
    shape = b.conv_shape(wide.tensor, 22, stride=(stride, stride))
    spatial = b.consumer(shape, 4, zero=min(zero, 5))
    bounds = Emit(low=low, high=1.5, consumers=(spatial,))
    b.conv(wide.tensor, bounds, 22, w_bits=8, groups=22, stride=(stride, stride), grid="zero")
    y = b.stream((*shape[:2], 7), output=True)
    b.conv(spatial.tensor, Emit(stream=y), 7, w_bits=8, kernel=(1, 1), padding=(0, 0), grid="zero")
    return b.build()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("low", "zero"), [(0.0, 0), (-0.25, 90), (0.0, 90), (None, 90)])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (11, 16), (9, 28)])
def test_codes_of_bounded_activations(size: Size, low: float | None, zero: int, stride: int, isa: str) -> None:
    check(*inverted_residual(size, stride, low, zero), isa, batches=(1, 3), threads=(1, 2, 3))


@pytest.mark.parametrize("isa", ISAS)
def test_an_upper_bound_between_two_codes(isa: str) -> None:
    """1.5 is code 153 of 255 exactly; a bound of 1.4973 ends between 152 and 153, and rounds as y itself does."""
    seen: set[int] = set()
    for high in (1.4973, 1.4951, 1.4902):
        b = Builder(2)
        image = b.image(4, 3, 16)
        bound = float(torch.tensor(high))
        codes = b.consumer((3, 16, 4), 8)
        b.quantize(image, Emit(low=0.0, high=bound, consumers=(codes,)))
        y = b.stream((3, 16, 4), output=True)
        b.conv(codes.tensor, Emit(stream=y), 4, w_bits=4, groups=4)
        program, blob = b.build()
        inputs = [random_inputs(program, 1, seed=1)[0] * 3]
        expected: dict[int, Tensor] = {}
        ReferenceRunner(program, blob).run(inputs, expected)
        _, trace = run_native(program, blob, inputs, isa, 1, traced=True)
        assert torch.equal(trace[codes.tensor], expected[codes.tensor])
        seen.add(int(trace[codes.tensor].max()))
    assert len(seen) > 1
