"""Codes against slow formulas in exact arithmetic, half to even, nested levels, and what decodes to what is trained."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbs.quant import codec
from lbs.quant.codec import CODINGS
from lbs.quant.fake import fake_activation, fake_weight
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer
from lbs_kernels.errors import PlanError

WIDTHS = (1, 2, 3, 4, 6, 8)


def round_half_even(value: Fraction) -> int:
    low = math.floor(value)
    rest = value - low
    if rest == Fraction(1, 2):
        return low + low % 2
    return low + (rest > Fraction(1, 2))


def clip(value: Fraction, low: int, high: int) -> Fraction:
    return max(Fraction(low), min(Fraction(high), value))


def exact_code(x: float, v: float, bits: int, kind: str) -> tuple[int, Fraction]:
    """LBS eq. 1-5 in rationals: the code, and how far n z lies from the nearest rounding boundary."""
    n, ratio = 2**bits - 1, Fraction(x) / Fraction(v)
    z = clip(ratio, 0, 1) if kind == "unsigned" else (clip(ratio, -1, 1) + 1) / 2
    return round_half_even(n * z), abs(n * z - math.floor(n * z) - Fraction(1, 2))


def encode(x: Tensor, v: Tensor, bits: int, kind: str) -> Tensor:
    if kind == "weight":
        return codec.weight_codes(x, v, bits)
    return codec.activation_codes(x, v, bits, CODINGS[kind])


def decode(codes: Tensor, v: Tensor, bits: int, kind: str) -> Tensor:
    if kind == "weight":
        return codec.weight_values(codes, v, bits)
    return codec.activation_values(codes, v, bits, CODINGS[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["unsigned", "signed", "weight"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_equal_exact_arithmetic(bits: int, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(300, generator=generator, dtype=dtype)
    v = torch.tensor(1.37, dtype=dtype)
    codes = encode(x, v, bits, kind)
    assert codes.dtype == dtype
    # Three roundings of values up to n: an element nearer than that to a boundary may fall on either side.
    blur = 3 * (2**bits - 1) * torch.finfo(dtype).eps
    compared = 0
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        expected, distance = exact_code(value, v.item(), bits, kind)
        if distance > blur:
            assert code == expected
            compared += 1
    assert compared > 290
    assert codes.unique().numel() > min(2**bits, 40) - 1


@pytest.mark.parametrize("kind", ["unsigned", "signed", "weight"])
def test_ties_go_to_the_even_code(kind: str) -> None:
    ties = torch.tensor([0.5, 1.5, 2.5])  # in code units, n = 3
    v = torch.tensor(1.5 if kind != "unsigned" else 3.0)
    x = ties if kind == "unsigned" else ties - 1.5
    assert encode(x, v, 2, kind).tolist() == [0, 2, 2]


@pytest.mark.parametrize("kind", ["unsigned", "signed", "weight"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_range_ends(kind: str, bits: int) -> None:
    v, n = torch.tensor(0.8), 2**bits - 1
    x = torch.tensor([-math.inf, -1e9, -0.8, 0.8, 1e9, math.inf])
    low, high = [0.0] * 3, [float(n)] * 3
    assert encode(x, v, bits, kind).tolist() == low + high
    decoded = decode(torch.tensor([0.0, n]), v, bits, kind)
    assert decoded.tolist() == pytest.approx([0.0 if kind == "unsigned" else -0.8, 0.8], rel=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["unsigned", "signed", "weight"])
def test_every_code_survives_decoding(kind: str, bits: int) -> None:
    codes = torch.arange(2.0**bits)
    v = torch.tensor(0.731)
    assert torch.equal(encode(decode(codes, v, bits, kind), v, bits, kind), codes)
    if kind != "unsigned":
        assert (decode(codes, v, bits, kind) != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_training_forward_is_the_decoded_code(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(bits)).to(dtype)
    v = torch.tensor(0.93, dtype=dtype)
    for kind in ("unsigned", "signed"):
        expected = decode(encode(x, v, bits, kind), v, bits, kind)
        assert torch.equal(fake_activation(x, v, bits, CODINGS[kind]), expected)
    assert torch.equal(fake_weight(x, v, bits), decode(encode(x, v, bits, "weight"), v, bits, "weight"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_with_a_zero_are_symmetric_integers(bits: int) -> None:
    """value = v m / (2^(b-1) - 1), m the nearest integer: 0 stays 0, the range's ends are codes, and -x mirrors x."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    x[::4] = 0
    v, top = torch.tensor(1.21, dtype=torch.float64), 2 ** (bits - 1) - 1
    codes = codec.weight_codes(x, v, bits, "zero")
    expected = [round_half_even(clip(Fraction(value) / Fraction(v.item()), -1, 1) * top) for value in x.tolist()]
    assert codec.weight_units(codes, bits, "zero").tolist() == expected
    assert codes.min() == 1
    assert codes.max() == 2**bits - 1
    values = codec.weight_values(codes, v, bits, "zero")
    assert (values[::4] == 0).all()
    assert torch.equal(codec.weight_codes(values, v, bits, "zero"), codes)
    assert torch.equal(fake_weight(-x, v, bits, "zero"), -fake_weight(x, v, bits, "zero"))
    assert float(values.max()) == float(v)


@pytest.mark.parametrize(("zero", "chain"), [(1, (2, 4, 8)), (2, (2, 4, 8)), (3, (2, 4, 8)), (5, (4, 8)), (117, (8,))])
def test_a_zero_among_the_codes_is_real_zero_at_every_width(zero: int, chain: tuple[int, ...]) -> None:
    coding = codec.Coding("unsigned", zero, codec.levels(chain[0]))
    x = torch.randn(500, generator=torch.Generator().manual_seed(zero), dtype=torch.float64)
    x[0] = 0
    v = torch.tensor(1.9, dtype=torch.float64)
    coarse: set[float] = set()
    for bits in chain:
        n, z = codec.levels(bits), coding.zero_at(bits)
        assert Fraction(z, n) == Fraction(zero, codec.levels(chain[0]))
        codes = codec.activation_codes(x, v, bits, coding)
        wanted = [round_half_even(Fraction(value) * n / Fraction(v.item())) + z for value in x.tolist()]
        blurred = sum(code != min(max(want, 0), n) for code, want in zip(codes.tolist(), wanted, strict=True))
        assert blurred == 0
        values = codec.activation_values(codes, v, bits, coding)
        assert codes[0] == z
        assert values[0] == 0
        every = codec.activation_values(torch.arange(n + 1.0, dtype=torch.float64), v, bits, coding)
        assert coarse <= {round(value, 12) for value in every.tolist()}  # widths nest
        coarse = {round(value, 12) for value in every.tolist()}
        low, high = coding.shares
        assert float(values.min()) >= -low * float(v) - 1e-12
        assert float(values.max()) <= high * float(v) + 1e-12


def test_scale_is_the_nearest_float() -> None:
    for bits in WIDTHS:
        for v in torch.rand(50, generator=torch.Generator().manual_seed(bits)) + 0.1:
            quantizer = ActivationQuantizer(bits)
            quantizer.set_range(0.0, float(v))
            nearest = torch.tensor((2**bits - 1) / float(v), dtype=torch.float64).float()
            assert quantizer.scale() == float(nearest)


def test_half_precision_is_encoded_in_float32() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    quantizer = ActivationQuantizer(8)
    quantizer.set_range(0.0, 0.877)
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
    assert torch.equal(quantizer(x), quantizer.values(quantizer.codes(x)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_network_input(dtype: torch.dtype) -> None:
    quantizer = InputQuantizer()
    quantizer.set_range(-2.0, 3.1)
    if dtype == torch.float64:
        quantizer.double()
    x = (5.1 * torch.rand(400, generator=torch.Generator().manual_seed(0)) - 2).to(dtype)
    codes = quantizer.codes(x)
    step = quantizer.step()
    assert quantizer.zero == 100
    assert step == pytest.approx(5.1 / 255, rel=1e-6)
    assert quantizer.codes(torch.zeros(1, dtype=dtype)).item() == quantizer.zero
    assert codes.min() >= 0
    assert codes.max() <= 255
    error = (quantizer.values(codes).double() - x.double()).abs().max()
    assert error <= 0.5 * step * 1.01
    assert torch.equal(quantizer(x), quantizer.values(codes).to(dtype))
    assert quantizer.codes(torch.tensor([-99.0, 99.0])).tolist() == [0, 255]


@given(st.floats(-50, 0), st.floats(0, 50))
def test_network_input_holds_zero_and_both_ends(low: float, high: float) -> None:
    quantizer = InputQuantizer()
    if high - low < 1e-3:
        return
    quantizer.set_range(low, high)
    assert 0 <= quantizer.zero <= 255
    ends = quantizer(torch.tensor([low, 0.0, high]))
    assert ends[1] == 0
    assert (ends - torch.tensor([low, 0.0, high])).abs().max() <= quantizer.step() * 1.0001


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ((), "empty"),
        ((2, 3), r"\(2, 3\): 3 is no larger integer multiple of 2"),
        ((2, 4, 6), "6 is no larger integer multiple of 4"),
        ((4, 2), "2 is no larger integer multiple of 4"),
        ((4, 4), "4 is no larger integer multiple of 4"),
        ((0, 4), "0 bits are outside 1..8"),
        ((2, 16), "16 bits are outside 1..8"),
    ],
)
def test_chains_that_do_not_nest(chain: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        codec.check_chain(chain)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(2, 4, 8), (2, 6), (3, 6), (1, 2, 4, 8), (1, 3, 6)]),
    st.integers(0, 10**6),
)
def test_residuals_of_a_chain_sum_to_the_direct_code(chain: tuple[int, ...], numerator: int) -> None:
    """LBS eq. 8-12 in rationals: z_b1 + sum r_bj = D(z, s_bK), apart from ties of the coarse steps."""
    codec.check_chain(chain)
    z = Fraction(numerator, 10**6)
    total = Fraction(0)
    for bits in chain:
        n = 2**bits - 1
        total += Fraction(round_half_even(n * (z - total)), n)
    assert total == Fraction(round_half_even((2 ** chain[-1] - 1) * z), 2 ** chain[-1] - 1)


@pytest.mark.parametrize("mode", ["scale", "full", "none"])
def test_standardize(mode: str) -> None:
    w = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.2
    kept = torch.ones(6, 1, 1, 1)
    kept[2] = 0
    result = codec.standardize(w, mode, kept)
    rest = w[[0, 1, 3, 4, 5]].double()
    mean, std = rest.mean(), rest.std(unbiased=False)
    expected = {"none": w.double(), "scale": w.double() / std, "full": (w.double() - mean) / std}[mode]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_masked_and_cut_weights_have_the_same_statistics() -> None:
    for seed in range(20):
        w = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(seed))
        kept = torch.ones(16, 1, 1, 1)
        kept[[1, 5, 6]] = 0
        alive = [i for i in range(16) if i not in (1, 5, 6)]
        for masked, cut in zip(codec.weight_statistics(w, kept), codec.weight_statistics(w[alive]), strict=True):
            assert torch.equal(masked, cut)


def test_constant_weights_stay_as_they_are() -> None:
    for w in (torch.full((1, 1, 1, 1), 0.3), torch.zeros(4, 4)):
        assert torch.equal(codec.standardize(w, "scale"), w)
