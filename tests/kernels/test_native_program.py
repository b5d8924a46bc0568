"""The native runner against the reference, every code and stream value, on every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from programs import CASES, Builder, one_conv, random_inputs, random_program, share_unsaturated
from test_activations import one_activation
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.program.activations import KINDS
from lbs_kernels.program.steps import STREAM_DTYPES, Emit, Program
from lbs_kernels.run.reference import ReferenceRunner

if extension.cpu is None:
    pytest.skip(f"native module missing: {extension.cpu_reason}", allow_module_level=True)

# "amx-model" runs the AMX kernels on a software model of the tile instructions; real AMX needs a processor that has it.
ISAS = [isa for isa, reason in extension.cpu.isa_reasons().items() if reason == ""]
BATCHES = (0, 1, 2, 3, 7)


def run_native(
    program: Program,
    blob: Tensor,
    inputs: list[Tensor],
    isa: str,
    threads: int,
    traced: bool,
    algorithms: Sequence[str] = (),
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Outputs and trace; every buffer is filled with garbage first, so that an unwritten cell shows."""
    native = extension.cpu.Program(program.to_json(), blob.data_ptr(), blob.numel(), isa, list(algorithms))
    batch = inputs[0].shape[0]
    outputs = []
    for index in program.outputs:
        spec = program.tensors[index]
        outputs.append(torch.full((batch, spec.channels, spec.height, spec.width), math.nan))
    trace: dict[int, Tensor] = {}
    for index, spec in enumerate(program.tensors):
        shape = (batch, spec.height, spec.width, spec.channels)
        if spec.form == "codes":
            trace[index] = torch.full(shape, 201, dtype=torch.uint8)
        elif spec.form == "stream":
            trace[index] = torch.full(shape, math.nan, dtype=STREAM_DTYPES[program.stream_dtype])
    addresses = [x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs], batch, threads
    for _ in range(2):  # the second call meets memory that has been used
        if traced:
            native.run_traced(*addresses, {index: value.data_ptr() for index, value in trace.items()})
        else:
            native.run(*addresses)
    return outputs, trace


def check(
    program: Program,
    blob: Tensor,
    isa: str,
    batches: tuple[int, ...] = BATCHES,
    threads: tuple[int, ...] = (1, 2),
    share: float = 0.15,
    algorithms: Sequence[str] = (),
) -> None:
    """Compares traced and plain runs with the reference."""
    inputs = random_inputs(program, max(batches), seed=5)
    expected_trace: dict[int, Tensor] = {}
    expected = ReferenceRunner(program, blob).run(inputs, expected_trace)
    assert share_unsaturated(program, expected_trace) > share
    for batch in batches:
        part = [x[:batch].contiguous() for x in inputs]
        for count in threads:
            outputs, trace = run_native(program, blob, part, isa, count, traced=True, algorithms=algorithms)
            for index, value in trace.items():
                name = program.tensors[index].name
                assert torch.equal(value, expected_trace[index][:batch]), (
                    f"{isa}, batch {batch}, {count} threads: {name}"
                )
            plain, _ = run_native(program, blob, part, isa, count, traced=False, algorithms=algorithms)
            for traced_output, output, truth in zip(outputs, plain, expected, strict=True):
                assert torch.equal(output.flatten(), truth[:batch].flatten())
                assert torch.equal(traced_output, output)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, isa: str) -> None:
    check(*CASES[case](11), isa, share=0.0 if case == "one_pixel" else 0.15)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_any_bits(kind: str, isa: str) -> None:
    step, expected = one_activation(kind)
    (output,), _ = run_native(step.program, step.blob, [step.image], isa, threads=1, traced=False)
    assert torch.equal(output.permute(0, 2, 3, 1), expected)


# Codes that a sum reads: pieces of rows, whole rows, pixels side by side where 1x1 windows alone read them, columns
# that are read with a stride as well, and a tail of a vector.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ["direct", "winograd-or-direct", "lanes", "depthwise"])
@pytest.mark.parametrize("size", [(9, 7), (5, 16), (3, 33), (1, 1), (14, 14)])
def test_residuals_of_codes(size: tuple[int, int], algorithm: str, isa: str) -> None:
    for reader, filters in (("none", 13), ("1x1", 24), ("stride", 21)):
        b = Builder(filters)
        image = b.image(filters, *size)
        shape = (*size, filters)
        codes, held = b.consumer(shape, 4), b.consumer(shape, 8, zero=90, top=2.0)
        b.quantize(image, Emit(consumers=(codes, held)))
        coded, narrow = b.consumer(shape, 8, zero=77, stands=True), b.consumer(shape, 3, zero=2)
        emit = Emit(residual=held.tensor, residual_step=b.step(held.scale), high=1.75, consumers=(coded, narrow))
        groups = filters if algorithm == "depthwise" else 1
        b.conv(codes.tensor, emit, filters, w_bits=4, groups=groups)
        if reader != "none":
            stride = (1, 1) if reader == "1x1" else (2, 2)
            seen = b.conv_shape(held.tensor, 5, (1, 1), stride, (0, 0))
            b.conv(held.tensor, Emit(stream=b.stream(seen, output=True)), 5, w_bits=8, kernel=(1, 1), stride=stride,
                   padding=(0, 0))  # fmt: skip
        alone = b.consumer(shape, 8)  # all that is made: beside the next tile
        emit = Emit(residual=coded.tensor, residual_step=b.step(coded.scale), low=0.0, consumers=(alone,))
        b.conv(narrow.tensor, emit, filters, w_bits=4, groups=groups)
        b.conv(
            alone.tensor, Emit(stream=b.stream(shape, output=True)), filters, w_bits=8, kernel=(1, 1), padding=(0, 0)
        )
        program, blob = b.build()
        convs = [i for i, step in enumerate(program.steps) if step.emit.residual_step is not None]
        free = algorithm == "depthwise" or (algorithm == "lanes" and isa.startswith("amx"))  # which has no such tiles
        wanted = ["" if free or i not in convs else algorithm for i in range(len(program.steps))]
        check(program, blob, isa, batches=(1, 3), share=0.0, algorithms=wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int, isa: str) -> None:
    check(*random_program(seed), isa, batches=(1, 3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("a_bits", range(1, 9))
def test_every_pair_of_bits(a_bits: int, isa: str) -> None:
    for w_bits in range(1, 9):
        program, blob = one_conv(w_bits, channels=21, filters=13, size=(6, 7), w_bits=w_bits, a_bits=a_bits, out_bits=8)
        check(program, blob, isa, batches=(1,), threads=(1,))
        if a_bits > 1:
            program, blob = one_conv(
                w_bits, channels=9, filters=5, size=(5, 5), w_bits=w_bits, a_bits=a_bits, signed=True, padding=(0, 0)
            )
            check(program, blob, isa, batches=(1,), threads=(1,))


# Widths of one vector +-1, several rows in a vector, one column; strides that split columns; pads beyond half a kernel.
GEOMETRY = {
    "rows_of_32": {"channels": 16, "filters": 12, "size": (4, 32)},
    "rows_of_16": {"channels": 12, "filters": 24, "size": (5, 16)},
    "rows_of_8": {"channels": 24, "filters": 44, "size": (8, 8)},
    "rows_of_17": {"channels": 5, "filters": 20, "size": (3, 17)},
    "rows_of_15": {"channels": 4, "filters": 8, "size": (4, 15)},
    "rows_of_14": {"channels": 8, "filters": 16, "size": (14, 14)},
    "rows_of_7": {"channels": 64, "filters": 13, "size": (7, 7)},
    "rows_of_5": {"channels": 3, "filters": 9, "size": (9, 5)},
    "one_column": {"channels": 7, "filters": 6, "size": (20, 1)},
    "stride_2_from_32": {"channels": 16, "filters": 24, "size": (6, 32), "stride": (2, 2)},
    "stride_2_from_16": {"channels": 13, "filters": 32, "size": (16, 16), "stride": (2, 2)},
    "stride_2_odd": {"channels": 6, "filters": 10, "size": (13, 11), "stride": (2, 2)},
    "stride_3_1x1": {
        "channels": 9,
        "filters": 7,
        "size": (10, 17),
        "kernel": (1, 1),
        "stride": (3, 3),
        "padding": (0, 0),
    },
    "stride_beyond_the_image": {"channels": 4, "filters": 4, "size": (3, 3), "stride": (7, 5)},
    "stride_of_rows_only": {"channels": 10, "filters": 14, "size": (9, 18), "stride": (2, 1)},
    "7x7_stride_2": {
        "channels": 3,
        "filters": 16,
        "size": (20, 34),
        "kernel": (7, 7),
        "stride": (2, 2),
        "padding": (3, 3),
    },
    "dilated": {"channels": 8, "filters": 8, "size": (12, 13), "dilation": (2, 3), "padding": (2, 3)},
    "wide_padding": {"channels": 4, "filters": 4, "size": (4, 4), "padding": (3, 3)},
    "even_kernel": {"channels": 6, "filters": 8, "size": (6, 9), "kernel": (2, 4), "padding": (1, 2)},
    "depthwise": {"channels": 13, "filters": 13, "size": (8, 9), "groups": 13},
    "depthwise_two_each": {"channels": 6, "filters": 12, "size": (8, 9), "groups": 6, "stride": (2, 2)},
    "groups_of_six": {"channels": 18, "filters": 15, "size": (6, 6), "groups": 3},
    "groups_of_eight": {"channels": 32, "filters": 48, "size": (6, 16), "groups": 4},
    "more_than_one_tile_of_k": {"channels": 70, "filters": 40, "size": (4, 16)},
    "matrix": {"channels": 70, "filters": 33, "size": (1, 1), "kernel": (1, 1), "padding": (0, 0)},
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str, isa: str) -> None:
    for w_bits, a_bits, zero in ((4, 4, 0), (8, 8, 0), (8, 8, 101), (2, 8, 0)):
        program, blob = one_conv(3, w_bits=w_bits, a_bits=a_bits, zero=zero, **GEOMETRY[name])  # type: ignore[arg-type]
        check(program, blob, isa, batches=(2, 3))


@pytest.mark.parametrize("isa", ISAS)
def test_overflow_corner(isa: str) -> None:
    """The largest sums the guard lets through: K n_w n_x just below 2^31, all codes at their ends."""
    channels = (2**31 - 1) // (255 * 255) // 9
    program, blob = one_conv(0, channels=channels, filters=4, size=(3, 3), w_bits=8, a_bits=8)
    planes = next(key for key in program.arrays if key.startswith("planes"))
    program.array(blob, planes)[:, :2] = program.array(blob, planes)[:, :1] * 0
    unused = channels % 32
    full = torch.full_like(program.array(blob, planes)[:, 2:], -1)
    full[..., -1] = (1 << unused) - 1 if unused else -1
    program.array(blob, planes)[:, 2:] = full
    for value in (1e9, -1e9):
        inputs = [torch.full((1, channels, 3, 3), value)]
        expected_trace: dict[int, Tensor] = {}
        ReferenceRunner(program, blob).run(inputs, expected_trace)
        _, trace = run_native(program, blob, inputs, isa, 1, traced=True)
        for index, native in trace.items():
            assert torch.equal(native, expected_trace[index])


@pytest.mark.parametrize("isa", ISAS)
def test_not_a_number_and_infinity_in_the_image(isa: str) -> None:
    program, blob = CASES["chain"](2)
    inputs = random_inputs(program, 1, seed=0)
    inputs[0].view(-1)[::7] = math.nan
    inputs[0].view(-1)[1::7] = math.inf
    inputs[0].view(-1)[2::7] = -math.inf
    expected_trace: dict[int, Tensor] = {}
    ReferenceRunner(program, blob).run(inputs, expected_trace)
    _, trace = run_native(program, blob, inputs, isa, 1, traced=True)
    for index, native in trace.items():
        assert torch.equal(native, expected_trace[index])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [1, 7, 8, 13])
def test_mean_adds_in_the_defined_order(channels: int, isa: str) -> None:
    """Returned as floats: the codes of other tests would hide another order of the sum."""
    b = Builder(0)
    image = b.image(channels, 7, 9)
    stream = b.stream((7, 9, channels))
    b.quantize(image, Emit(stream=stream))
    b.pool(stream, Emit(stream=b.stream((1, 1, channels), output=True, flat=True)), "mean")
    program, blob = b.build()
    inputs = random_inputs(program, 5, seed=3)
    expected = ReferenceRunner(program, blob).run(inputs)[0]
    backwards = sum(inputs[0].flatten(2).flip(2).unbind(2)) * (1 / 63)
    assert not torch.equal(backwards, expected)  # the order matters for these numbers
    output = run_native(program, blob, inputs, isa, 2, traced=False)[0][0]
    assert torch.equal(output.flatten(1), expected)


MAXIMA = {
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1)),
    "3x3 stride 1": ((3, 3), (1, 1), (1, 1)),
    "2x2 stride 2": ((2, 2), (2, 2), (0, 0)),
    "5x4 stride 3": ((5, 4), (3, 3), (2, 1)),
    "2x3 stride 1 and 2": ((2, 3), (1, 2), (1, 0)),
    "1x1 stride 4": ((1, 1), (4, 4), (0, 0)),
}


def maximum_of_floats(name: str, size: tuple[int, int], low: float | None) -> tuple[Program, Tensor, Tensor]:
    """A maximum of a stream, its blob, and images with zeros of both signs, infinities and what is not a number."""
    kernel, stride, padding = MAXIMA[name]
    b = Builder(0)
    image = b.image(6, *size)
    stream = b.stream((*size, 6))
    b.quantize(image, Emit(low=low, stream=stream))
    y = b.stream(b.conv_shape(stream, 6, kernel, stride, padding), output=True)
    b.pool(stream, Emit(stream=y), "max", kernel, stride, padding)
    program, blob = b.build()
    images = random_inputs(program, 3, seed=1)[0] - 2
    chosen = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    images[chosen < 0.3] = -0.0
    images[chosen < 0.2] = 0.0
    images[chosen < 0.1] = -math.inf
    images[chosen < 0.03] = math.nan
    return program, blob, images


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(7, 6), (6, 15), (5, 17), (9, 34), (3, 70)])
@pytest.mark.parametrize("name", MAXIMA)
@pytest.mark.parametrize("low", [None, -1.5])
def test_maximum_of_floats(low: float | None, name: str, size: tuple[int, int], isa: str) -> None:
    """Not a number wins where no bound has replaced it; padding never does. Of vectors and what is left of them."""
    program, blob, images = maximum_of_floats(name, size, low)
    expected = ReferenceRunner(program, blob).run([images])[0]
    assert expected.isnan().any() == (low is None)
    for threads in (1, 2):
        output = run_native(program, blob, [images], isa, threads, traced=False)[0][0]
        same = (output == expected) | (output.isnan() & expected.isnan())
        assert bool(same.all())
