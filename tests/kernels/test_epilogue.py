from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program.epilogue import (
    ACC_LIMIT,
    consume_reference,
    emit_reference,
    encode_reference,
    fma32,
    fma_channels,
    thresholds,
)
from lbs_kernels.program.steps import Activation, Consumer, Emit, Program, build_blob

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST = Fraction(2**24 - 1) * Fraction(2) ** 104


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest an exact number, half to even, by integer arithmetic alone."""
    if value == 0:
        return 0.0
    exponent = -149
    while abs(value) / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    rounded = round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent  # Fraction rounds half to even
    return math.copysign(math.inf, rounded) if abs(rounded) > LARGEST else float(rounded)


def exact_fma(a: float, b: float, c: float) -> float:
    return round_to_float32(Fraction(a) * Fraction(b) + Fraction(c))


def scalar_fma(a: float, b: float, c: float) -> float:
    return fma32(torch.tensor(a), torch.tensor(b), torch.tensor(c)).item()


@settings(max_examples=400, deadline=None)
@given(FINITE, FINITE, FINITE)
def test_fma_of_any_floats_is_exact(a: float, b: float, c: float) -> None:
    assert scalar_fma(a, b, c) == exact_fma(a, b, c)


@settings(max_examples=400, deadline=None)
@given(st.integers(-(2**31), 2**31), FINITE, FINITE, st.integers(0, 40))
def test_fma_of_sums_is_exact(acc: int, m: float, b: float, above: int) -> None:
    """Also where M and B lie so far apart that float64 does not hold the sum; and as floats of no bound."""
    sums = torch.tensor([[float(acc)]], dtype=torch.float64)
    multiplier, bias = torch.tensor([m]), torch.tensor([b])
    expected = exact_fma(float(sums.float()), m, b)
    assert fma_channels(sums, multiplier, bias, abs(acc) + above).item() == expected
    assert fma_channels(sums, multiplier, bias).item() == expected


# acc * M is a tie and a little more, or B is what is beside the tie; float64 loses the little.
LOST_IN_FLOAT64 = [
    (939185.0, 4682833.0, 2.0**66),  # 2^42 + 1, where the last bit is 2^43
    (-939185.0, 4682833.0, -(2.0**66)),
    (3.0, 2.0**23 + 1, 2.0**-29),
    (3.0, 2.0**23 + 1, -(2.0**-29)),
]


def test_rounding_twice_would_be_seen() -> None:
    wrong = [
        float(torch.tensor(a * b + c, dtype=torch.float64).float()) != exact_fma(a, b, c) for a, b, c in LOST_IN_FLOAT64
    ]
    assert sum(wrong) == 3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fma_of_a_batch_in_parts(dtype: torch.dtype, channels_last: bool) -> None:
    """Many parts; channels that float64 holds, and channels that it does not."""
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**20), 2**20, (40, 4, 30, 30), generator=generator).to(dtype)
    acc = acc.contiguous(memory_format=torch.channels_last) if channels_last else acc
    hard = torch.tensor(LOST_IN_FLOAT64)
    acc[::3, :, 7, 5] = hard[:, 0].to(dtype)
    near = torch.randn(2, 4, 1, 1, generator=generator)
    for multiplier, bias in (near, hard[:, 1:].T.reshape(2, 4, 1, 1)):
        expected = fma32(acc.float(), multiplier, bias)
        for bound in (2**20, None):
            y = fma_channels(acc, multiplier, bias, bound)
            assert torch.equal(y, expected)
            assert y.stride() == acc.stride()
    exact = torch.tensor([exact_fma(*row) for row in LOST_IN_FLOAT64])
    assert torch.equal(y[::3, :, 7, 5], exact.expand(14, 4))
    assert fma_channels(acc[:0], multiplier, bias, 2**20).shape == (0, 4, 30, 30)


@settings(max_examples=300, deadline=None)
@given(st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24), st.integers(-60, 60))
def test_fma_near_ties_is_exact(a: int, b: int, c: int, shift: int) -> None:
    """Significands of full length and a far addend: where rounding twice goes wrong."""
    addend = float(torch.tensor(math.ldexp(float(c), shift)))
    assert scalar_fma(float(a), float(b), addend) == exact_fma(float(a), float(b), addend)


def test_fma_where_rounding_twice_is_wrong() -> None:
    """1 + 2^-24 + 2^-60: float64 drops the last term, then the tie rounds to 1 instead of 1 + 2^-23."""
    a, b = torch.tensor([1.0 + 2.0**-23, 1.0]), torch.tensor([1.0, 2.0**-24])
    c = torch.tensor([2.0**-24 * (1 + 2.0**-20), 1.0])
    assert torch.equal(fma32(a, b, c), torch.tensor([exact_fma(*map(float, row)) for row in zip(a, b, c, strict=True)]))
    large, tiny = 1.0 + 2.0**-11, 2.0**-60
    x = torch.tensor([large])  # large^2 = 1 + 2^-10 + 2^-22; plus 2^-60 sticks out of float64
    naive = (x.double() * x.double() + tiny).float().item()
    tie = torch.tensor(1.0 + 2.0**-12)  # squared: 1 + 2^-11 + 2^-24, exactly between two floats
    twice = (tie.double() * tie.double() + tiny).float().item()
    once = scalar_fma(tie.item(), tie.item(), tiny)
    assert once == exact_fma(tie.item(), tie.item(), tiny) == twice + 2.0**-23
    assert fma32(x, x, torch.tensor([tiny])).item() == exact_fma(large, large, tiny) == naive


def test_fma_broadcasts_and_passes_special_values() -> None:
    acc = torch.tensor([[1.0, 2.0], [3.0, math.inf]])
    y = fma32(acc, torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25]))
    assert torch.equal(y, torch.tensor([[2.5, -1.75], [6.5, -math.inf]]))
    assert math.isnan(scalar_fma(math.inf, 0.0, 1.0))
    assert scalar_fma(3e38, 10.0, -3e38) == math.inf
    assert scalar_fma(1e-45, 0.5, 0.0) == 0.0  # half of the smallest number, a tie to even


def test_encode_rounds_half_to_even_and_saturates() -> None:
    u = torch.tensor([-1.0, -0.5, 0.5, 1.5, 2.5, 2.4999998, 3.5, 99.0, math.inf, -math.inf, math.nan])
    codes = encode_reference(u, Consumer(0, bits=2, scale=1.0))
    assert codes.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3, 0, 0]


def test_encode_with_a_zero_point() -> None:
    u = torch.tensor([-100.0, -2.0, 0.0, 1.5, 400.0, math.nan])
    codes = encode_reference(u, Consumer(0, bits=8, scale=1.0, zero=3))
    assert codes.tolist() == [0, 1, 3, 5, 255, 0]


def test_encode_signed_has_no_zero() -> None:
    u = torch.tensor([-9.0, -1.5, -0.6, -0.4, 0.4, 0.6, 1.5, 9.0])
    codes = encode_reference(u, Consumer(0, bits=2, scale=1.0, signed=True))
    assert codes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_relu_comes_before_the_code() -> None:
    """It shows where 0 is not the lowest code."""
    program, blob = tiny_program({})
    y = torch.tensor([-9.0, -0.6, 0.4, 1.2])
    assert consume_reference(y, Consumer(0, 2, 1.0, signed=True, relu=True), program, blob).tolist() == [2, 2, 2, 3]
    assert consume_reference(y, Consumer(0, 4, 1.0, zero=5, relu=True), program, blob).tolist() == [5, 5, 5, 6]


@pytest.mark.parametrize(
    "consumer",
    [Consumer(0, 4, 3.25), Consumer(0, 8, 37.5, zero=117), Consumer(0, 2, 0.75, signed=True), Consumer(0, 1, 0.5)],
)
def test_decoded_codes_encode_to_themselves(consumer: Consumer) -> None:
    codes = torch.arange(1 << consumer.bits, dtype=torch.uint8)
    centre = ((1 << consumer.bits) - 1) / 2 if consumer.signed else float(consumer.zero)
    values = (codes.double() - centre) / consumer.scale
    assert torch.equal(encode_reference(values.float(), consumer), codes)


def tiny_program(arrays: dict[str, Tensor], stream_dtype: str = "float32") -> tuple[Program, Tensor]:
    """Only what the epilogue looks at: arrays and the stream type."""
    specs, blob, _ = build_blob(arrays)
    return Program((), (), (), (), specs, stream_dtype), blob


@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
def test_consumers_read_the_stored_stream(stream_dtype: str) -> None:
    program, blob = tiny_program({"G": torch.tensor([1.5, -2.0]), "H": torch.tensor([0.25, 1.0])}, stream_dtype)
    y = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(0))
    residual = torch.randn(2, 3, 3, 2).to(getattr(torch, stream_dtype))
    consumer = Consumer(2, 8, 64.0, pre_scale="G", pre_bias="H", relu=True)
    tensors = {0: residual}
    emit_reference(y, Emit(residual=0, low=-1.0, high=1.25, stream=1, consumers=(consumer,)), program, blob, tensors)
    stored = (y + residual.float()).clamp(-1.0, 1.25).to(getattr(torch, stream_dtype))
    assert torch.equal(tensors[1], stored)
    u = fma32(stored.float(), torch.tensor([1.5, -2.0]), torch.tensor([0.25, 1.0])).clamp(min=0)
    assert torch.equal(tensors[2], (u * 64).round().clamp(0, 255).to(torch.uint8))


EMITS = {
    "plain": Emit(),
    "relu": Emit(low=0.0),
    "relu6": Emit(low=0.0, high=6.0),
    "stream": Emit(stream=5),
    "narrow": Emit(low=0.1, high=1.0, stream=5),
}


@pytest.mark.parametrize("emit", EMITS.values(), ids=EMITS.keys())
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stream_dtype", ["float32", "bfloat16"])
def test_thresholds_give_the_codes_of_the_floats(emit: Emit, bits: int, norm: bool, stream_dtype: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    filters = 24
    arrays = {
        "M": torch.randn(filters, generator=generator) * torch.logspace(-7, 0, filters),
        "B": torch.randn(filters, generator=generator),
        "G": torch.randn(filters, generator=generator),
        "H": torch.randn(filters, generator=generator),
    }
    arrays["M"][3], arrays["G"][5], arrays["M"][7] = 0.0, 0.0, -1e-30  # constant or nearly so
    program, blob = tiny_program(arrays, stream_dtype)
    consumer = Consumer(0, bits, 2.125, relu=norm)
    if norm:
        consumer = replace(consumer, pre_scale="G", pre_bias="H")
    levels, flip = thresholds(arrays["M"], arrays["B"], emit, consumer, program, blob)
    assert levels.shape == (filters, (1 << bits) - 1)
    assert bool(flip.any())
    assert not bool(flip.all())

    near = (levels.to(torch.int64)[:, :, None] + torch.arange(-2, 3)).flatten(1).clamp(-ACC_LIMIT, ACC_LIMIT)
    span = torch.logspace(0, math.log10(ACC_LIMIT), 60, dtype=torch.float64).to(torch.int64)
    wide = torch.cat([span, -span, torch.zeros(1, dtype=torch.int64)]).expand(filters, -1)
    acc = torch.cat([near, wide], dim=1).T.to(torch.int32)
    y = fma32(acc.float(), arrays["M"], arrays["B"])
    if emit.low is not None:
        y = y.clamp(min=emit.low)
    if emit.high is not None:
        y = y.clamp(max=emit.high)
    if emit.stream is not None:
        y = y.to(getattr(torch, stream_dtype))
    expected = consume_reference(y, consumer, program, blob)
    reached = torch.where(flip[:, None], acc[..., None] <= levels, acc[..., None] >= levels)
    assert torch.equal(reached.sum(dim=-1).to(torch.uint8), expected)
    assert len(expected.unique()) > 1
    if emit.high is None:
        assert len(expected.unique()) == 1 << bits  # every code occurs


def test_thresholds_refuse_what_they_cannot_serve() -> None:
    program, blob = tiny_program({})
    one = torch.ones(1)
    with pytest.raises(FormatError, match="5 bits; thresholds serve up to 4"):
        thresholds(one, one, Emit(), Consumer(0, 5, 1.0), program, blob)
    for emit in (Emit(residual=0), Emit(gate=0), Emit(activation=Activation("tanh"))):
        with pytest.raises(FormatError, match="an activation, a gate or a residual"):
            thresholds(one, one, emit, Consumer(0, 4, 1.0), program, blob)
