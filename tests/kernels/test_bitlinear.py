from __future__ import annotations

import one_step
import pytest
import torch
from contenders import CONTENDERS, assert_same, filled_memory
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program import operations
from lbs_kernels.program.epilogue import fma32
from lbs_kernels.program.planes import pack_weights

# batch, channels, filters, w_bits, a_bits, zero, signed
CASES = {
    "one of everything": (1, 1, 1, 1, 1, 0, False),
    "word - 1": (3, 31, 10, 8, 8, 0, False),
    "word": (3, 32, 16, 4, 4, 0, False),
    "word + 1": (3, 33, 17, 2, 8, 0, False),
    "tile + 1 rows": (17, 64, 15, 8, 2, 0, False),
    "a classifier": (5, 64, 100, 8, 8, 0, False),
    "two blocks of words - 1": (2, 127, 33, 3, 5, 0, False),
    "wide": (1, 515, 9, 2, 2, 0, False),
    "zero point": (4, 40, 12, 8, 8, 77, False),
    "signed": (4, 40, 12, 4, 4, 0, True),
}


def operands(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x codes, weight codes [O, C], planes, multiplier, bias."""
    batch, channels, filters, w_bits, a_bits, _, _ = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 1 << a_bits, (batch, channels), generator=generator, dtype=torch.uint8)
    w = torch.randint(0, 1 << w_bits, (filters, channels), generator=generator, dtype=torch.uint8)
    planes = pack_weights(w[:, None, None], w_bits)
    return x, w, planes, torch.randn(filters, generator=generator), torch.randn(filters, generator=generator)


def slow_accumulator(name: str, x: Tensor, w: Tensor) -> Tensor:
    _, _, _, w_bits, a_bits, zero, signed = CASES[name]
    value = 2 * x.to(torch.int64) - ((1 << a_bits) - 1) if signed else x.to(torch.int64) - zero
    weight = 2 * w.to(torch.int64) - ((1 << w_bits) - 1)
    return (value[:, None, :] * weight[None]).sum(dim=2)


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_plain_integer_arithmetic(name: str) -> None:
    *_, a_bits, zero, signed = CASES[name]
    reading = {"a_bits": a_bits, "zero": zero, "signed": signed}
    x, w, planes, multiplier, bias = operands(name)
    acc = operations.accumulate(x[:, None, None], planes, **reading)
    expected = slow_accumulator(name, x, w)
    assert_same(acc[:, 0, 0], expected.to(torch.int32), "accumulator")
    y = one_step.linear(x, planes, multiplier, bias, **reading).run("reference")
    assert_same(y[:, 0, 0], fma32(expected.float(), multiplier, bias), "y")


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("name", CASES)
def test_back_ends_equal_the_reference(name: str, backend: str, device: str) -> None:
    *_, a_bits, zero, signed = CASES[name]
    x, _, *rest = operands(name, 1)
    step = one_step.linear(x, *rest, a_bits=a_bits, zero=zero, signed=signed)
    expected = step.run("reference")
    with filled_memory():
        actual = step.run(backend, device)
    assert_same(actual, expected, "y")


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *CONTENDERS])
def test_overflow_corner(backend: str, device: str) -> None:
    x = torch.full((2, 33025), 255, dtype=torch.uint8)
    w = torch.full((3, 1, 1, 33025), 255, dtype=torch.uint8)
    w[1], w[2, ..., 5] = 0, 254
    largest = 255 * 255 * 33025
    expected = torch.tensor([largest, -largest, largest - 2 * 255], dtype=torch.float64).float()
    y = one_step.linear(x, pack_weights(w, 8), a_bits=8).run(backend, device)
    assert_same(y[:, 0, 0], expected.expand(2, 3), "y")
    if backend == "reference":
        acc = operations.accumulate(x[:, None, None], pack_weights(w, 8), a_bits=8)
        assert acc[0].flatten().tolist() == [largest, -largest, largest - 2 * 255]


def test_one_product_more_is_refused() -> None:
    planes = pack_weights(torch.zeros(1, 1, 1, 33026, dtype=torch.uint8), 8)
    with pytest.raises(FormatError, match="33026 products"):
        one_step.linear(torch.zeros(1, 33026, dtype=torch.uint8), planes, a_bits=8).run("auto")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_batch(backend: str) -> None:
    _, _, *rest = operands("word")
    y = one_step.linear(torch.zeros(0, 32, dtype=torch.uint8), *rest, a_bits=4).run(backend)
    assert y.shape == (0, 1, 1, 16)


def test_planes_of_other_channels_are_refused() -> None:
    _, _, *rest = operands("word")
    with pytest.raises(FormatError, match=r"int32 \(4, 16, 1, 1\); the step needs int32 \(4, 16, 1, 2\)"):
        one_step.linear(torch.zeros(1, 33, dtype=torch.uint8), *rest, a_bits=4).run("auto")


def test_fewer_channels_in_the_same_word_are_noticed() -> None:
    """Planes of 32 channels also fit 31 in words; the set bits of channel 31 give them away."""
    x, _, *rest = operands("word")
    with pytest.raises(FormatError, match="beyond channel 30"):
        one_step.linear(x[:, :31], *rest, a_bits=4).run("reference")
