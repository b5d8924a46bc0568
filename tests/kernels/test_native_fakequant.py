"""Fused quantizer kernels of training against torch in float64, for every instruction set of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError

if extension.cpu is None:
    pytest.skip(f"native module missing: {extension.cpu_reason}", allow_module_level=True)

# AMX adds convolutions alone.
ISAS = [isa for isa, reason in extension.cpu.isa_reasons().items() if reason == "" and not isa.startswith("amx")]
# empty, one, lanes +-1, a sum block +-1, several chunks and a tail
COUNTS = [0, 1, 7, 8, 9, 15, 16, 17, 2047, 2049, 70001]
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CHAINS = [(4,), (2, 4), (2, 4, 8), (8, 4, 2), (1, 2, 4, 8)]  # the last width is the value's
KINDS = ("unsigned", "affine", "signed")
V = float(torch.tensor(1.37))


def sample(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 1.5
    x[::5] = 0.0  # the edge of the unsigned range
    return x.to(dtype)


def shares(kind: str) -> tuple[float, float]:
    """Of the range, below and above 0; those of `affine` give codes of 2, 4 and 8 bits a whole number for 0."""
    return {"unsigned": (0.0, 1.0), "affine": (1 / 3, 2 / 3), "signed": (1.0, 1.0)}[kind]


def ends(kind: str) -> tuple[float, float]:
    low, high = shares(kind)
    return float(-low * torch.tensor(V)), float(high * torch.tensor(V))


def chains(kind: str) -> list[tuple[int, ...]]:
    return [chain for chain in CHAINS if kind != "affine" or 1 not in chain]


def arguments(
    chain: tuple[int, ...], kind: str
) -> tuple[float, list[float], list[float], list[float], list[float], tuple[float, float], bool]:
    signed = kind == "signed"
    v, span = torch.tensor(V), torch.tensor(2 * V if signed else V)
    levels = [float(2**bits - 1) for bits in chain]
    zeros = [n // 3 if kind == "affine" else 0.0 for n in levels]
    scales = [float(torch.tensor(n) / span) for n in levels]
    return V, scales, [float(v / n) for n in levels], levels, zeros, shares(kind), signed


def decoded(x: Tensor, chain: tuple[int, ...], kind: str) -> list[Tensor]:
    """The value of every width, in float32 operations."""
    values = []
    for scale, step, n, zero in zip(*arguments(chain, kind)[1:5], strict=True):
        t = x.float() * scale
        q = ((t + n / 2) if kind == "signed" else t.round() + zero).round().clamp(0, n)
        values.append((2 * q - n) * step if kind == "signed" else (q - zero) * step)
    return values


def forward(x: Tensor, chain: tuple[int, ...], kind: str, threads: int, isa: str) -> tuple[Tensor, list[float]]:
    y = torch.full_like(x, math.nan)
    sums = extension.cpu.fake_quant_forward(
        x.data_ptr(), y.data_ptr(), x.numel(), *arguments(chain, kind), threads, DTYPES[x.dtype], isa
    )
    return y, sums


def one_width(n: float) -> tuple[list[float], list[float], list[float], list[float], tuple[float, float]]:
    """Scale and step 1, n levels, from code 0 on."""
    return [1.0], [1.0], [n], [0.0], (0.0, 1.0)


def rounding(terms: Tensor) -> float:
    """Error of sums of float32 terms: 2048 / L <= 256 of them added in float32, and each a rounding or two off."""
    return 260 * 2**-24 * float(terms.abs().sum()) + 1e-12


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "chain"), [(kind, chain) for kind in KINDS for chain in chains(kind)], ids=str)
def test_forward(isa: str, dtype: torch.dtype, kind: str, chain: tuple[int, ...]) -> None:
    """The value is the codec's, bit for bit; the sums are those of the errors at the other widths."""
    low, high = ends(kind)
    for count in COUNTS:
        x = sample(count, dtype, count)
        values = decoded(x, chain, kind)
        clipped = x.double().clamp(low, high)
        results = [forward(x, chain, kind, threads, isa) for threads in (1, 2)]
        assert results[0][1] == results[1][1]  # the number of threads does not matter
        for y, sums in results:
            assert torch.equal(y, values[-1].to(dtype))
            assert len(sums) == len(chain) - 1
            for got, value in zip(sums, values[:-1], strict=True):
                errors = (clipped - value.double()).abs()
                # a subtraction of float32 numbers up to V rounds by 2^-24 V
                assert abs(got - float(errors.sum())) <= rounding(errors) + 2**-24 * V * count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "chain"), [(kind, chain) for kind in KINDS for chain in chains(kind)], ids=str)
def test_backward(isa: str, dtype: torch.dtype, kind: str, chain: tuple[int, ...]) -> None:
    (low, high), (below, above) = ends(kind), shares(kind)
    for count in COUNTS:
        x, gy = sample(count, dtype, count), sample(count, dtype, count + 1)
        results = []
        for threads in (1, 2, 2):
            gx = torch.full_like(x, math.nan)
            sums = extension.cpu.fake_quant_backward(
                x.data_ptr(), gy.data_ptr(), gx.data_ptr(), count, *arguments(chain, kind), threads,
                DTYPES[x.dtype], isa,
            )  # fmt: skip
            results.append((gx, sums))
        values = [value.double() for value in decoded(x, chain, kind)]
        wide, grad, inside = x.double(), gy.double(), (x.float() >= low) & (x.float() <= high)
        outside = above * (wide > high).double() - below * (wide < low).double()
        slope = torch.where(inside, (values[-1] - wide) / V, outside)
        for gx, (of_v, by_width) in results:
            assert torch.equal(gx, torch.where(inside, gy, torch.zeros_like(gy)))
            assert (of_v, by_width) == results[0][1]
            terms = grad.abs() * 2**-22  # y - x cancels: float32 numbers up to V, divided by V
            assert abs(of_v - float((grad * slope).sum())) <= rounding(grad * slope) + float(terms.sum())
            for got, value in zip(by_width, values[:-1], strict=True):
                product = grad * (values[-1] - value)
                assert abs(got - float(product.sum())) <= rounding(product) + V * float(terms.sum())


@pytest.mark.parametrize("isa", ISAS)
def test_forward_lets_nan_through(isa: str) -> None:
    x = torch.tensor([math.nan, -math.inf, math.inf, -0.6, 0.5, 1.5, 2.5] * 5)
    y = torch.full_like(x, -7.0)
    extension.cpu.fake_quant_forward(x.data_ptr(), y.data_ptr(), x.numel(), 3.0, *one_width(3.0), isa=isa)
    assert y[::7].isnan().all()
    assert torch.equal(y[1:7], torch.tensor([0.0, 3.0, 0.0, 0.0, 2.0, 2.0]))


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(4)
    here = (x.data_ptr(), x.data_ptr())
    call = extension.cpu.fake_quant_forward
    one = one_width(1.0)
    with pytest.raises(FormatError, match="dtype code 7"):
        call(*here, 4, 1.0, *one, dtype=7)
    with pytest.raises(FormatError, match="count is -1"):
        call(*here, -1, 1.0, *one)
    with pytest.raises(BackendError, match="isa 'sse9' is unknown"):
        call(*here, 4, 1.0, *one, isa="sse9")
    with pytest.raises(FormatError, match="5 widths; give 1 to 4"):
        call(*here, 4, 1.0, *[[1.0] * 5] * 4, (0.0, 1.0))
    with pytest.raises(FormatError, match="a scale, a step and a zero each"):
        call(*here, 4, 1.0, [1.0] * 2, [1.0], [1.0], [0.0], (0.0, 1.0))
    with pytest.raises(FormatError, match="v is 0"):
        extension.cpu.fake_quant_backward(*here, x.data_ptr(), 4, 0.0, *one)
