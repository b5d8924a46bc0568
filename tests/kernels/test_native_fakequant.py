"""Fused quantizer kernels of training against torch, for every instruction set of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError

if extension.cpu is None:
    pytest.skip(f"native module missing: {extension.cpu_reason}", allow_module_level=True)

ISAS = [isa for isa in ("portable", "avx2", "avx512vnni") if extension.cpu.isa_reasons()[isa] == ""]
# empty, one, lanes +-1, a sum block +-1, several chunks and a tail
COUNTS = [0, 1, 7, 8, 9, 15, 16, 17, 2047, 2049, 70001]
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def sample(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 1.5
    x[::5] = 0.0  # the edge of the range
    return x.to(dtype)


def forward(x: Tensor, scale: float, step: float, n: float, threads: int, isa: str, low: float = 0.0) -> Tensor:
    y = torch.full_like(x, math.nan)
    extension.cpu.fake_quant_forward(
        x.data_ptr(), y.data_ptr(), x.numel(), scale, step, n, low, threads, DTYPES[x.dtype], isa
    )
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_forward_equals_torch(isa: str, dtype: torch.dtype, bits: int) -> None:
    n = 2**bits - 1
    v = torch.tensor(1.37)
    scale, step = float(torch.tensor(n / v.item())), float(v / n)
    for count in COUNTS:
        x = sample(count, dtype, count)
        expected = ((x.float() * scale).round().clamp(0, n) * step).to(dtype)
        for threads in (1, 2):
            assert torch.equal(forward(x, scale, step, n, threads, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_forward_lets_nan_through_and_honours_low(isa: str) -> None:
    x = torch.tensor([math.nan, -math.inf, math.inf, -0.6, 0.5, 1.5, 2.5] * 5)
    y = forward(x, 1.0, 1.0, 3.0, 1, isa, low=-1.0)
    assert y[::7].isnan().all()
    assert torch.equal(y[1:7], torch.tensor([-1.0, 3.0, -1.0, 0.0, 2.0, 2.0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_backward_equals_torch(isa: str, dtype: torch.dtype, bits: int) -> None:
    n, v = 2**bits - 1, float(torch.tensor(1.37))
    for count in COUNTS:
        x, gy = sample(count, dtype, count), sample(count, dtype, count + 1)
        results = []
        for threads in (1, 2, 2):
            gx = torch.full_like(x, math.nan)
            grad = extension.cpu.fake_quant_backward(
                x.data_ptr(), gy.data_ptr(), gx.data_ptr(), count, v, float(n), threads, DTYPES[dtype], isa
            )
            results.append((grad, gx))
        wide, inside = x.double(), (x >= 0) & (x <= v)
        q = (x.float() * float(torch.tensor(n / v))).round().double()
        slope = torch.where(inside, q / n - wide / v, (wide > v).double())
        for grad, gx in results:
            assert torch.equal(gx, torch.where(inside, gy, torch.zeros_like(gy)))
            assert grad == results[0][0]  # the number of threads does not matter
            # float32 terms of size |gy|, summed in float32 over blocks of 2048 / lanes
            assert grad == pytest.approx(
                (gy.double() * slope).sum().item(), abs=1e-6 * gy.double().abs().sum().item() + 1e-6
            )


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(4)
    call = extension.cpu.fake_quant_forward
    with pytest.raises(FormatError, match="dtype code 7"):
        call(x.data_ptr(), x.data_ptr(), 4, 1.0, 1.0, 1.0, 0.0, 1, 7)
    with pytest.raises(FormatError, match="count is -1"):
        call(x.data_ptr(), x.data_ptr(), -1, 1.0, 1.0, 1.0)
    with pytest.raises(BackendError, match="isa 'sse9' is unknown"):
        call(x.data_ptr(), x.data_ptr(), 4, 1.0, 1.0, 1.0, isa="sse9")
    with pytest.raises(FormatError, match="v is 0"):
        extension.cpu.fake_quant_backward(x.data_ptr(), x.data_ptr(), x.data_ptr(), 4, 0.0, 1.0)
