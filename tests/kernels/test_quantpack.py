from __future__ import annotations

import numpy as np
import pytest
import torch
from contenders import CONTENDERS, assert_same, filled_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.format import pack_planes, unpack_planes
from lbs_kernels.quantpack.op import quantpack

# bits, zero, signed
READINGS = [(1, 0, False), (2, 0, False), (4, 0, False), (8, 0, False), (8, 117, False), (2, 0, True), (8, 0, True)]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 31, 3, 3), (1, 33, 4, 2), (3, 64, 1, 1)]


def scalar_code(value: float, scale: float, bits: int, zero: int, signed: bool) -> int:
    """The definition, one element at a time with numpy's float32."""
    n = (1 << bits) - 1
    t = np.float32(np.float32(value) * np.float32(scale))
    if signed:
        t = np.float32(t + np.float32(n / 2))
    return int(min(max(float(np.rint(t)) + zero, 0), n))


@pytest.mark.parametrize(("bits", "zero", "signed"), READINGS)
def test_reference_follows_the_definition(bits: int, zero: int, signed: bool) -> None:
    n = (1 << bits) - 1
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * n / 2
    x[0, 0, 0] = torch.tensor([0.5, 1.5, -0.5, 2.5])  # ties
    codes = quantpack(x, scale=1.0, bits=bits, zero=zero, signed=signed, backend="reference")
    assert codes.shape == (2, 5, 4, 3)
    for place in np.ndindex(2, 5, 4, 3):
        image, row, column, channel = place
        value = float(x[image, channel, row, column])
        assert int(codes[place]) == scalar_code(value, 1.0, bits, zero, signed)


@settings(max_examples=100, deadline=None)
@given(
    value=st.floats(width=32, allow_nan=False),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    reading=st.sampled_from(READINGS),
)
def test_any_float_is_encoded_as_defined(value: float, scale: float, reading: tuple[int, int, bool]) -> None:
    with np.errstate(over="ignore"):
        expected = scalar_code(value, scale, *reading)
    bits, zero, signed = reading
    code = quantpack(torch.full((1, 1, 1, 1), value), scale=scale, bits=bits, zero=zero, signed=signed)
    assert int(code) == expected


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "zero", "signed"), READINGS)
def test_back_ends_equal_the_reference(
    shape: tuple[int, int, int, int], bits: int, zero: int, signed: bool, backend: str, device: str
) -> None:
    n = (1 << bits) - 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + 0.3
    x.view(-1)[0] = 2.0**-1  # a tie wherever the scale is a power of two
    scale = float(torch.tensor(n / 2.5)) if not signed else float(torch.tensor(n / 5))
    expected = quantpack(x, scale=scale, bits=bits, zero=zero, signed=signed, backend="reference")
    with filled_memory():
        actual = quantpack(x.to(device), scale=scale, bits=bits, zero=zero, signed=signed, backend=backend)
    assert_same(actual, expected, "codes")
    if x.numel() > 100 and bits > 1:
        assert float(((expected > 0) & (expected < n)).float().mean()) > 0.3


def test_codes_go_to_planes_and_back() -> None:
    x = torch.randn(2, 33, 3, 3)
    codes = quantpack(x, scale=1.5, bits=4)
    assert torch.equal(unpack_planes(pack_planes(codes, 4), 4, 33), codes)


def test_strides_do_not_matter() -> None:
    x = torch.randn(2, 3, 5, 4)
    expected = quantpack(x, scale=2.0, bits=4, zero=7)
    assert_same(quantpack(x.to(memory_format=torch.channels_last), scale=2.0, bits=4, zero=7), expected, "codes")
    assert_same(quantpack(x.transpose(2, 3), scale=2.0, bits=4, zero=7), expected.transpose(1, 2), "codes")


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nothing_to_encode(shape: tuple[int, int, int, int], backend: str) -> None:
    codes = quantpack(torch.zeros(shape), scale=1.0, bits=2, backend=backend)
    assert codes.shape == (shape[0], shape[2], shape[3], shape[1])
    assert codes.dtype == torch.uint8


def test_operands_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ShapeError, match="float64"):
        quantpack(x.double(), scale=1.0, bits=4)
    with pytest.raises(ShapeError, match=r"expected float32 \[N, C, H, W\]"):
        quantpack(x[0], scale=1.0, bits=4)
    for scale in (0.0, -1.0, 0.1, float("inf"), float("nan"), 1e300):
        with pytest.raises(FormatError, match="positive and exact in float32"):
            quantpack(x, scale=scale, bits=4)
    with pytest.raises(FormatError, match="0 bits"):
        quantpack(x, scale=1.0, bits=0)
    with pytest.raises(FormatError, match="signed codes with zero"):
        quantpack(x, scale=1.0, bits=4, zero=1, signed=True)


def test_op_is_well_formed() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(torch.ops.lbs_kernels.quantpack.default, (x, 1.5, 4, 0, False, "auto"))
