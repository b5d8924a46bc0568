"""The epilogue of sums that read or write streams, and of several readers, whose codes are made of another's or not:
against the reference on every instruction set.

Sums of up to 16 steps are emitted as they are made where codes are among the results, others beside the next tile's
products; maps end in a part of a vector or do not, and filters in a part of a group.
"""

from __future__ import annotations

import random

import pytest
import torch
from programs import Builder, float32, random_inputs
from test_native_program import ISAS, check, run_native
from torch import Tensor

from lbs_kernels.program.steps import Emit, Program
from lbs_kernels.run.reference import ReferenceRunner

LAYERS = {  # channels, filters, kernel
    "1x1, one step": (3, 7, 1),
    "1x1, 16 steps": (64, 12, 1),
    "1x1, 17 steps": (68, 13, 1),
    "3x3": (5, 20, 3),
    "3x3, 48 filters": (5, 48, 3),
}
RESIDUALS = ("none", "floats", "an output", "codes")
RESULTS = (
    "stream", "stream and codes", "stream and codes of two scales", "codes", "codes of two scales",
    "codes and codes of them",
)  # fmt: skip


def net(
    layer: str | tuple[int, int, int],
    residual: str,
    results: str,
    size: tuple[int, int],
    bounds: tuple[float | None, float | None] = (0.0, None),
    zero: int = 0,
    w_bits: int = 8,
    a_bits: int = 8,
    **reader: tuple[int, int],
) -> tuple[Program, Tensor]:
    """Image, codes, what is added, the layer, and what reads its results, through a window like `reader`."""
    channels, filters, kernel = LAYERS[layer] if isinstance(layer, str) else layer
    window = {"kernel": (kernel, kernel), "padding": (kernel // 2, kernel // 2)}
    b = Builder(7)
    image = b.image(channels, *size)
    codes = b.consumer((*size, channels), a_bits)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = (*size, filters)
    added: dict[str, object] = {}
    if residual in ("floats", "an output"):  # which lies where the caller wants it
        added["residual"] = floats = b.stream(shape, output=residual == "an output")
        b.conv(codes.tensor, Emit(stream=floats), filters, w_bits=4, kernel=(1, 1), padding=(0, 0))
    elif residual == "codes":
        held = b.consumer(shape, 8, zero=zero)
        b.conv(codes.tensor, Emit(consumers=(held,)), filters, w_bits=4, kernel=(1, 1), padding=(0, 0))
        added = {"residual": held.tensor, "residual_step": b.step(held.scale)}
    consumers = []
    if results != "stream":
        consumers.append(b.consumer(shape, 8, zero=zero, stands=results.startswith("codes and")))
    if results.startswith("codes and"):
        consumers.append(b.consumer(shape, 4))
    elif results.endswith("two scales"):
        consumers.append(b.consumer(shape, 4, zero=zero // 16, top=1.5))
    stream = b.stream(shape, output=results == "stream") if results.startswith("stream") else None
    emit = Emit(low=bounds[0], high=bounds[1], stream=stream, consumers=tuple(consumers), **added)  # type: ignore[arg-type]
    b.conv(codes.tensor, emit, filters, w_bits=w_bits, **window)  # type: ignore[arg-type]
    for consumer in consumers:
        out = b.conv_shape(consumer.tensor, 5, **reader)
        b.conv(consumer.tensor, Emit(stream=b.stream(out, output=True)), 5, w_bits=4, **reader)
    return b.build()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layer", LAYERS)
def test_residuals_and_results(layer: str, residual: str, results: str, isa: str) -> None:
    for size in ((9, 14), (4, 16), (3, 19)):
        check(*net(layer, residual, results, size), isa, batches=(1, 3), threads=(1, 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("layer", ["1x1, 16 steps", "1x1, 17 steps"])
def test_bounds_and_zeros(layer: str, results: str, isa: str) -> None:
    for bounds in ((None, None), (-0.5, None), (0.0, 1.125), (None, 0.75)):
        for residual in RESIDUALS:
            program, blob = net(layer, residual, results, (3, 19), bounds, zero=93)
            check(program, blob, isa, batches=(1,), threads=(1,), share=0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_codes(bits: int, isa: str) -> None:
    """All 256 codes that stand for values, read on scales from a tenth to ten times theirs, with zeros at either end
    and between. Scales where codes fall on halves, which are rounded to even, are among them.
    """
    draw = random.Random(bits)
    most = (1 << bits) - 1
    seen: set[int] = set()
    ratios = [most / 255, most / 510, 0.5, 1.0, 1 / 17] + [float32(10 ** draw.uniform(-1, 1)) for _ in range(7)]
    for ratio in ratios:
        zeros = draw.choice((0, 40, 128, 255)), draw.choice((0, most // 2, most))
        b = Builder(draw.randrange(1 << 20))
        image = b.image(3, 24, 19)
        codes = b.consumer((24, 19, 3), 8)
        b.quantize(image, Emit(consumers=(codes,)))
        wide = b.consumer((24, 19, 12), 8, zero=zeros[0], top=1.0, stands=True)
        narrow = b.consumer((24, 19, 12), bits, zero=zeros[1], top=most / (wide.scale * ratio) / (1 + bool(zeros[1])))
        emit = Emit(low=None if zeros[0] else 0.0, consumers=(wide, narrow))
        b.conv(codes.tensor, emit, 12, w_bits=8, kernel=(1, 1), padding=(0, 0))
        for tensor in (wide.tensor, narrow.tensor):
            b.conv(tensor, Emit(stream=b.stream((24, 19, 5), output=True)), 5, w_bits=2)
        program, blob = b.build()
        inputs = random_inputs(program, 1, seed=bits)
        expected: dict[int, Tensor] = {}
        ReferenceRunner(program, blob).run(inputs, expected)
        _, trace = run_native(program, blob, inputs, isa, 1, traced=True)
        for index, native in trace.items():
            assert torch.equal(native, expected[index]), (bits, ratio, zeros)
        seen |= set(expected[wide.tensor].flatten().tolist())
    assert seen == set(range(256))


@pytest.mark.parametrize("isa", ISAS)
def test_last_pixels_of_a_second_reader(isa: str) -> None:
    """Maps one pixel wide, where a vector of the second reader's codes lies in as many pieces as lanes; the first
    reader's lie in one row.
    """
    for height in (5, 21, 35):
        b = Builder(height)
        shape = (height, 1, 12)
        image = b.image(3, height, 1)
        codes, held = b.consumer((height, 1, 3), 8), b.consumer(shape, 8)
        b.quantize(image, Emit(consumers=(codes,)))
        b.conv(codes.tensor, Emit(low=0.0, consumers=(held,)), 12, w_bits=4, kernel=(1, 1), padding=(0, 0))
        wide, narrow = b.consumer(shape, 8, stands=True), b.consumer(shape, 4)
        emit = Emit(low=0.0, residual=held.tensor, residual_step=b.step(held.scale), consumers=(wide, narrow))
        b.conv(codes.tensor, emit, 12, w_bits=8, kernel=(1, 1), padding=(0, 0))
        for tensor, kernel in ((wide.tensor, (1, 1)), (narrow.tensor, (3, 1))):
            window = {"kernel": kernel, "padding": (kernel[0] // 2, 0)}
            b.conv(tensor, Emit(stream=b.stream((height, 1, 5), output=True)), 5, w_bits=4, **window)  # type: ignore[arg-type]
        check(*b.build(), isa, batches=(1,), threads=(1,))
