"""Activations: how far the float32 formulas are from the functions, and that every back end computes the formulas."""

from __future__ import annotations

import math

import one_step
import pytest
import torch
from contenders import CONTENDERS, assert_same
from torch import Tensor
from torch.nn import functional as F

from lbs_kernels.program.activations import KINDS, SLOPES, activate
from lbs_kernels.program.steps import Activation

VALUES = {"elu": 0.75, "leaky_relu": 0.10000000149011612}
TRUE = {
    "elu": lambda x: F.elu(x, VALUES["elu"]),
    "gelu": lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, VALUES["leaky_relu"]),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# Units in the last place, as docs/format.md states them; measured over a 61st of all float32 numbers between 1e-30 and
# 1e4, and a tenth added.
ULPS = {
    "elu": 1.6,
    "gelu": 7.5,
    "hardsigmoid": 1.5,
    "hardswish": 2.8,
    "leaky_relu": 0.5,
    "mish": 4.6,
    "sigmoid": 2.8,
    "silu": 2.5,
    "tanh": 2.8,
}


def samples() -> Tensor:
    """float32 of both signs: of all magnitudes from 1e-30 to 1e4, and evenly within [-20, 20]."""
    generator = torch.Generator().manual_seed(0)
    first, last = (int(torch.tensor(x).view(torch.int32)) for x in (1e-30, 1e4))
    x = torch.randint(first, last, (400_000,), generator=generator, dtype=torch.int32).view(torch.float32)
    return torch.cat([x, -x, torch.rand(400_000, generator=generator) * 40 - 20])


def any_bits() -> Tensor:
    """Random bit patterns, subnormal numbers, infinities and NaN among them, and the numbers at which formulas bend."""
    patterns = torch.randint(-(2**31), 2**31, (2000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    numbers = patterns.view(torch.float32)
    numbers = torch.where(numbers.isnan(), math.nan, numbers)  # no operation gives a signalling one
    bends = [0.0, 3.0, 6.0, 9.5, 10.0, 12.5, 20.0, 80.0, 3.0e38, 1e-40, math.inf]
    near = torch.tensor(bends)
    near = torch.cat([near, near.nextafter(torch.tensor(math.inf)), near.nextafter(torch.tensor(0.0))])
    return torch.cat([numbers, near, -near, torch.tensor([math.nan]), samples()[::997]])


@pytest.mark.parametrize("kind", ULPS)
def test_distance_from_the_function(kind: str) -> None:
    x = samples()
    y, true = activate(x, kind, VALUES.get(kind, 0.0)).double(), TRUE[kind](x.double())
    size = true.abs().float()
    ulp = (size.nextafter(torch.tensor(math.inf)) - size).double()
    seen = (true.abs() > 1e-30) & ((kind != "gelu") | (x > -12.5))  # below, the value at -12.5 stands for all
    worst = ((y - true).abs() / ulp)[seen].max()
    assert worst <= ULPS[kind]
    assert worst > ULPS[kind] / 3  # a limit that nothing comes near says nothing
    assert bool(((y - true).abs()[~seen] < 1e-29).all())


def test_distance_of_gelu_by_the_hyperbolic_tangent() -> None:
    """Its exponent is rounded before it is one: what the tail loses is small beside x, not beside y."""
    x = samples()
    error = (activate(x, "gelu_tanh").double() - TRUE["gelu_tanh"](x.double())).abs() / x.abs().double()
    assert 2.0**-24 < error.max() <= 2.2 * 2.0**-24


@pytest.mark.parametrize("kind", SLOPES)
def test_no_function_is_steeper_than_stated(kind: str) -> None:
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    steepest = (TRUE[kind](x).diff().abs() / x.diff()).max()
    assert 0.9 * SLOPES[kind] < steepest <= SLOPES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_gives_a_nan(kind: str) -> None:
    y = activate(any_bits(), kind, VALUES.get(kind, 0.0), torch.zeros(1) if kind == "prelu" else None)
    assert not y.isnan().any()


def test_parts_of_a_batch_and_memory_formats_change_nothing() -> None:
    x = torch.randn(5, 8, 40, 30, generator=torch.Generator().manual_seed(2))
    slope = torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(3))
    for kind in KINDS:
        given = slope if kind == "prelu" else None
        y = activate(x, kind, 0.5, given)
        assert torch.equal(y, torch.stack([activate(image, kind, 0.5, given) for image in x]))
        last = activate(x.contiguous(memory_format=torch.channels_last), kind, 0.5, given)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, y)


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_back_ends_equal_the_reference(kind: str, backend: str, device: str) -> None:
    step, expected = one_activation(kind)
    assert_same(step.run("reference"), expected, "reference")
    assert_same(step.run(backend, device).cpu(), expected, backend)


def one_activation(kind: str) -> tuple[one_step.OneStep, Tensor]:
    """A program that applies it to any bits, and what comes out: float32 [1, H, W, 5]."""
    x = any_bits()
    x = x[: len(x) // 85 * 85].reshape(1, 5, -1, 17)
    slope = torch.tensor([0.25, 0.0, -0.5, 1.0, 3.0]) if kind == "prelu" else None
    activation = Activation(kind, VALUES.get(kind, 0.0), None if slope is None else "slope")  # type: ignore[arg-type]
    return one_step.activation(x, activation, slope), activate(
        x.permute(0, 2, 3, 1), kind, activation.value, slope
    ).contiguous()
