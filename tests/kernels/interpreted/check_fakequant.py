"""The quantizers of training in Triton's interpreter: values and gx equal the codec's, every element; sums in float64.

Started by tests/kernels/test_triton_fakequant.py; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/check_fakequant.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lbs.quant import codec
from lbs.quant.codec import CODINGS
from lbs.quant.fake import fake_weight
from lbs_kernels.fakequant import triton_impl, triton_weights
from lbs_kernels.fakequant.triton_impl import BLOCK, CHUNK, DTYPES
from lbs_kernels.gpu.triton.common import INTERPRETED

# Infinities and numbers beyond a dtype are tested: numpy warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

KINDS = ["unsigned", "signed", "weight"]
ZERO = codec.Coding("unsigned", 1, 3)  # real 0 is code 1 of 2 bits
COUNTS = [0, 1, 17, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 77]  # empty, one, odd, a block and its neighbours, several
CHAINS = [(4,), (2, 4), (2, 4, 8), (8, 4, 2), (1, 2, 4, 8), (2, 4, 8, 4)]  # the last width is the value's
V = torch.tensor(1.37)


def test_the_interpreter_is_on() -> None:
    assert INTERPRETED.value


def sample(count: int, dtype: torch.dtype, seed: int, v: Tensor = V) -> Tensor:
    """Random numbers of which two thirds lie in the range; the range's ends, their neighbours, and ties of rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 1.5
    x[::5] = 0.0
    ends = torch.stack([v, -v])
    special = torch.cat([ends, torch.nextafter(ends, 2 * ends), torch.nextafter(ends, 0 * ends)])
    ties = (torch.arange(16) - 7.5) * v / 15  # codes of 4 bits fall between two integers, or nearly so
    special = torch.cat([special, ties])[: max(count - 1, 0)]
    x[1 : 1 + len(special)] = special
    return x.to(dtype)


def low(kind: str) -> float:
    return 0.0 if kind == "unsigned" else -float(V)


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal in every element, NaN with NaN."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def rounding(terms: Tensor) -> float:
    """Error of a sum of float32 terms: each rounded once or twice, and 11 times on the way to the sum of 2048."""
    return 14 * 2**-24 * float(terms.abs().sum()) + 1e-30


def check_forward(x: Tensor, chain: tuple[int, ...], kind: str, v: Tensor = V) -> None:
    y, errors = triton_impl.forward(x, v, chain[:-1], chain[-1], kind)
    wide = x.float()
    same(y, codec.round_trip(wide, v, chain[-1], CODINGS[kind]).to(x.dtype))
    assert y.stride() == x.stride()
    assert errors.dtype == torch.float32
    assert errors.shape == (len(chain) - 1,)
    clipped = wide.double().clamp(low(kind), float(v))
    span = float(v) * (1 if kind == "unsigned" else 2) * max(1, x.numel())
    for got, bits in zip(errors.tolist(), chain, strict=False):
        terms = (clipped - codec.round_trip(wide, v, bits, CODINGS[kind]).double()).abs()
        # a difference of float32 numbers up to v is rounded by 2^-24 v; the quotient is rounded to float32
        allowed = (rounding(terms) + 2**-24 * float(v) * x.numel()) / span
        assert abs(got - float(terms.sum()) / span) <= allowed + 2**-24 * got


def check_backward(grad: Tensor, x: Tensor, chain: tuple[int, ...], kind: str) -> None:
    gx, grad_v, products = triton_impl.backward(grad, x, V, chain[:-1], chain[-1], kind)
    inside = (x.float() >= low(kind)) & (x.float() <= V)
    same(gx, torch.where(inside, grad, torch.zeros_like(grad)))
    assert gx.stride() == x.stride()
    values = [codec.round_trip(x.float(), V, bits, CODINGS[kind]).double() for bits in chain]
    wide, gy = x.double(), grad.double()
    below = -1.0 if kind != "unsigned" else 0.0
    slope = torch.where(inside, (values[-1] - wide) / float(V), torch.where(wide > V, 1.0, below).double())
    cancelled = 2**-22 * float(gy.abs().sum())  # y - x: float32 numbers up to v, divided by v
    assert grad_v.shape == ()
    terms = gy * slope
    assert abs(float(grad_v) - float(terms.sum())) <= rounding(terms) + cancelled + 2**-24 * abs(float(grad_v))
    assert products.shape == (len(chain) - 1,)
    for got, value in zip(products.tolist(), values[:-1], strict=True):
        terms = gy * (values[-1] - value)
        assert abs(got - float(terms.sum())) <= rounding(terms) + float(V) * cancelled + 2**-24 * abs(got)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    for seed, count in enumerate(COUNTS):
        x, grad = sample(count, torch.float32, seed), sample(count, torch.float32, seed + 100)
        check_forward(x, (2, 4, 8), kind)
        check_backward(grad, x, (2, 4, 8), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_among_the_codes(dtype: torch.dtype) -> None:
    """Values, gradients, and a corrected guess, of a range that reaches a third below 0."""
    x, grad, chain = sample(BLOCK + 1, dtype, 1), sample(BLOCK + 1, dtype, 2), (2, 4, 8)
    y, errors = triton_impl.forward(x, V, chain[:-1], chain[-1], "unsigned", ZERO.shares)
    values = [codec.round_trip(x.float(), V, bits, ZERO) for bits in chain]
    same(y, values[-1].to(dtype))
    low, high = (share * V for share in (-ZERO.shares[0], ZERO.shares[1]))
    clipped, span = x.double().clamp(float(low), float(high)), float(V) * x.numel()
    for got, value in zip(errors.tolist(), values, strict=False):
        terms = (clipped - value.double()).abs()
        assert abs(got - float(terms.sum()) / span) <= (rounding(terms) + 2**-24 * span) / span + 2**-24 * got
    gx, grad_v, products = triton_impl.backward(grad, x, V, chain[:-1], chain[-1], "unsigned", ZERO.shares)
    inside, wide, gy = (x.float() >= low) & (x.float() <= high), x.double(), grad.double()
    same(gx, torch.where(inside, grad, torch.zeros_like(grad)))
    outside = torch.where(wide > float(high), 2 / 3, -1 / 3)
    terms = gy * torch.where(inside, (values[-1].double() - wide) / float(V), outside)
    cancelled = 2**-22 * float(gy.abs().sum())
    assert abs(float(grad_v) - float(terms.sum())) <= rounding(terms) + cancelled + 2**-24 * abs(float(grad_v))
    for got, value in zip(products.tolist(), values[:-1], strict=True):
        terms = gy * (values[-1].double() - value.double())
        assert abs(got - float(terms.sum())) <= rounding(terms) + float(V) * cancelled + 2**-24 * abs(got)
    guessed, _ = triton_impl.forward(x, V, (), torch.tensor(2), "unsigned", ZERO.shares)
    triton_impl.correct(guessed, x, V, torch.tensor(8), torch.tensor(2), "unsigned", ZERO.shares)
    same(guessed, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chains(kind: str, dtype: torch.dtype) -> None:
    for seed, chain in enumerate(CHAINS):
        x, grad = sample(BLOCK + 1, dtype, seed), sample(BLOCK + 1, dtype, seed + 100)
        check_forward(x, chain, kind)
        check_backward(grad, x, chain, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_many_ranges(bits: int, kind: str) -> None:
    """n / v and v / n are rounded once: a reciprocal would be seen in some of these."""
    ranges = torch.rand(6, generator=torch.Generator().manual_seed(bits)) * 3 + 0.01
    for seed, v in enumerate(ranges):
        check_forward(sample(300, torch.float32, seed, v), (bits,), kind, v)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_ties_round_to_even_and_ends_belong_to_the_range(kind: str) -> None:
    v, n = torch.tensor(3.0), 3  # scale, step and values are exact
    x = torch.tensor([-3.5, -3.0, -2.0, -0.5, 0.0, 0.5, 1.5, 2.0, 2.5, 3.0, 3.5])
    y, _ = triton_impl.forward(x, v, (), 2, kind)
    signed = kind != "unsigned"
    expected = [-3, -3, -3, -1, 1, 1, 1, 1, 3, 3, 3] if signed else [0, 0, 0, 0, 0, 0, 2, 2, 2, 3, 3]
    # signed codes: x / 2 + 1.5 is 0.5 at -2 and goes to 0; 1.5 at 0 goes to 2; 2.5 at 2 goes to 2
    assert y.tolist() == expected
    grad = torch.arange(1.0, len(x) + 1)
    gx, grad_v, _ = triton_impl.backward(grad, x, v, (), 2, kind)
    inside = (x >= (-n if signed else 0)) & (x <= n)
    assert gx.tolist() == (grad * inside).tolist()
    slope = torch.where(inside, (y - x) / v, torch.where(x > v, 1.0, -float(signed)))
    assert float(grad_v) == pytest.approx(float((grad * slope).sum()), abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_goes_through_and_infinities_are_clipped(kind: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, -math.inf, math.inf, 0.3, -0.3] * 3).to(dtype)
    y, errors = triton_impl.forward(x, V, (2,), 8, kind)
    same(y, codec.round_trip(x.float(), V, 8, CODINGS[kind]).to(dtype))
    assert y[::5].isnan().all()
    assert errors.isnan().all()
    gx, _, _ = triton_impl.backward(torch.ones_like(x), x, V, (), 8, kind)
    assert gx[:5].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0 if kind == "unsigned" else 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_width_that_the_device_knows_is_the_same(bits: int, kind: str) -> None:
    x, grad, chain = sample(BLOCK + 9, torch.float32, 3), sample(BLOCK + 9, torch.float32, 4), (2, 4, 8)
    told = torch.tensor(bits)
    for ours, theirs in (
        (triton_impl.forward(x, V, chain, told, kind), triton_impl.forward(x, V, chain, bits, kind)),
        (triton_impl.backward(grad, x, V, chain, told, kind), triton_impl.backward(grad, x, V, chain, bits, kind)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for guess in (2, bits):
        y, _ = triton_impl.forward(x, V, (), guess, kind)
        before = y.clone().fill_(7.0) if guess == bits else y
        triton_impl.correct(before, x, V, told, torch.tensor(guess), kind)
        wanted = triton_impl.forward(x, V, (), bits, kind)[0]
        # nothing is written where the guess was right
        assert torch.equal(before, torch.full_like(y, 7.0) if guess == bits else wanted)


def test_many_partial_sums_are_added_in_order() -> None:
    """More of them than are added at a time, of very different sizes; twice the same bits."""
    parts = torch.randn(3, 2 * CHUNK + 5, generator=torch.Generator().manual_seed(1)).exp2() * 1e3
    totals = triton_impl.totals_of(parts, V, 10, False, "signed")
    assert totals.tolist() == parts.double().sum(1).float().tolist()
    assert torch.equal(totals, triton_impl.totals_of(parts, V, 10, False, "signed"))
    means = triton_impl.totals_of(parts, V, 10, True, "signed")
    assert means.tolist() == (parts.double().sum(1) / (20 * V.double())).float().tolist()


def test_channels_last_is_kept() -> None:
    x = sample(2 * 3 * 5 * 7, torch.bfloat16, 1).view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    grad = sample(2 * 3 * 5 * 7, torch.bfloat16, 2).view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    check_forward(x, (2, 4, 8), "unsigned")
    check_backward(grad, x, (2, 4, 8), "unsigned")


def weights(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights whose mean is far from 0, a scale, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(count, generator=generator) * 0.05 + 0.3
    return w, torch.tensor(0.0517), torch.randn(count, generator=generator)


@pytest.mark.parametrize("edge", [7.3, -6.1, 0.7])
@pytest.mark.parametrize("count", [1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 77])
def test_standardised_weights(count: int, edge: float) -> None:
    """Values and gw as torch makes them, one operation at a time, every element; 0.7 clips about all."""
    (w, scale, grad), v = weights(count, count), torch.tensor(edge)
    source, size = w.clone().requires_grad_(), v.clone().requires_grad_()
    for bits in (2, 4, torch.tensor(8)):
        x = codec.standardize(w, "scale")
        y, std = triton_weights.forward(w, v, scale, bits)
        assert float(std) == float(codec.weight_statistics(w)[1])
        assert torch.equal(y, codec.round_trip(x, v.abs(), int(bits), CODINGS["weight"]) * scale)
        gw, edge_grad = triton_weights.backward(grad, w, v, scale, std, bits)
        with torch.enable_grad():
            expected = fake_weight(codec.standardize(source, "scale"), size, int(bits)) * scale
        theirs, total = torch.autograd.grad(expected, (source, size), grad)
        assert torch.equal(gw, theirs)
        terms = float((grad * scale).abs().sum())
        assert abs(float(edge_grad) - float(total)) <= 2**-20 * terms * (1 + 2 / abs(edge))


def test_many_programs_share_one_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than are added at a time: 16 here, where 1024 programs take 10 s."""
    monkeypatch.setattr(triton_weights, "CHUNK", 16)
    w, scale, _ = weights(BLOCK * (16 + 3) + 5, 1)
    y, std = triton_weights.forward(w, V, scale, 4)
    assert float(std) == float(codec.weight_statistics(w)[1])
    assert torch.equal(y, codec.round_trip(codec.standardize(w, "scale"), V, 4, CODINGS["weight"]) * scale)


def test_equal_weights_have_deviation_one() -> None:
    w = torch.full((2 * BLOCK + 3,), 0.3)
    assert float(triton_weights.forward(w, V, torch.tensor(1.0), 4)[1]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_range_means_its_size(kind: str) -> None:
    x, grad = sample(300, torch.float32, 5), sample(300, torch.float32, 6)
    ours, theirs = (triton_impl.forward(x, v, (2, 4), 8, kind) for v in (-V, V))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = (triton_impl.backward(grad, x, v, (2,), 8, kind) for v in (-V, V))
    assert all(torch.equal(a, b) for a, b in zip(ours, (theirs[0], -theirs[1], theirs[2]), strict=True))


@pytest.mark.parametrize("kind", ["weight", "zero"])
@pytest.mark.parametrize(("filters", "count"), [(1, 5), (3, 27), (5, 130), (2, BLOCK + 3)])
def test_a_range_for_every_filter(kind: str, filters: int, count: int) -> None:
    """Each row as with a scalar range of its own; the errors in units of it, and averaged over all."""
    generator = torch.Generator().manual_seed(count)
    v = (torch.rand(filters, 1, generator=generator) + 0.4) * torch.where(torch.arange(filters) % 2 == 0, 1.0, -1.0)[
        :, None
    ]
    x, grad = torch.randn(2, filters, count, generator=generator)
    chain = (4, 8) if kind == "zero" else (2, 4, 8)
    y, errors = triton_impl.forward(x, v, chain[:-1], chain[-1], kind)
    gx, grad_v, products = triton_impl.backward(grad, x, v, chain[:-1], chain[-1], kind)
    assert grad_v.shape == v.shape
    rows = [triton_impl.forward(x[o], v[o, 0], chain[:-1], chain[-1], kind) for o in range(filters)]
    backs = [triton_impl.backward(grad[o], x[o], v[o, 0], chain[:-1], chain[-1], kind) for o in range(filters)]
    same(y, torch.stack([row for row, _ in rows]))
    same(y, codec.round_trip(x, v.abs(), chain[-1], CODINGS[kind]))
    same(gx, torch.stack([row for row, _, _ in backs]))
    torch.testing.assert_close(errors, torch.stack([row for _, row in rows]).mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_v[:, 0], torch.stack([row for _, row, _ in backs]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products, torch.stack([row for _, _, row in backs]).sum(0), rtol=1e-5, atol=1e-4)
    guess = triton_impl.forward(x, v, (), torch.tensor(2), kind)[0]
    triton_impl.correct(guess, x, v, torch.tensor(chain[-1]), torch.tensor(2), kind)
    same(guess, y)


@pytest.mark.parametrize("kind", ["weight", "zero"])
def test_standardised_weights_with_a_range_for_every_filter(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    w, grad = torch.randn(2, 6, 4, 3, 3, generator=generator)
    v, scale = torch.rand(6, 1, 1, 1, generator=generator) + 0.6, torch.tensor(0.21)
    y, std = triton_weights.forward(w, v, scale, 4, kind)
    x = codec.standardize(w, "scale")
    assert float(std) == float(codec.weight_statistics(w)[1])
    assert torch.equal(y, codec.round_trip(x, v, 4, CODINGS[kind]) * scale)
    gw, gv = triton_weights.backward(grad, w, v, scale, std, 4, kind)
    assert gv.shape == v.shape
    source, edge = w.clone().requires_grad_(), v.clone().requires_grad_()
    grid = "odd" if kind == "weight" else "zero"
    expected = fake_weight(codec.standardize(source, "scale"), edge, 4, grid) * scale
    of_w, of_v = torch.autograd.grad(expected, (source, edge), grad)
    torch.testing.assert_close(gw, of_w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gv, of_v, rtol=1e-4, atol=1e-6)
