from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import one_step
import pytest
import torch
from contenders import CONTENDERS, assert_same, filled_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program.planes import pack_planes, unpack_planes
from lbs_kernels.run.backends import why_not

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
    codes = one_step.quantpack(x, scale=1.0, bits=bits, zero=zero, signed=signed).run("reference")
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
    step = one_step.quantpack(torch.full((1, 1, 1, 1), value), scale=scale, bits=bits, zero=zero, signed=signed)
    assert int(step.run("auto")) == expected


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
    step = one_step.quantpack(x, scale=scale, bits=bits, zero=zero, signed=signed)
    expected = step.run("reference")
    with filled_memory():
        actual = step.run(backend, device)
    assert_same(actual, expected, "codes")
    if x.numel() > 100 and bits > 1:
        assert float(((expected > 0) & (expected < n)).float().mean()) > 0.3


# Tails of vectors, whole vectors only, channels that fill no group of four, one group, several.
IMAGES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 3, 4, 8), (1, 4, 8, 8), (2, 5, 7, 9), (1, 13, 4, 8)]


def bytes_and_affine(shape: tuple[int, int, int, int], dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """An image of all bytes, or of floats, and a multiplier and bias that bring its values near 1."""
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype == "uint8":
        x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        x = torch.randn(shape, generator=generator) * 50 + 128
    multiplier = (torch.rand(shape[1], generator=generator) + 0.5) / 64
    return x, multiplier, torch.rand(shape[1], generator=generator) - 2


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_reference_multiplies_and_adds_with_one_rounding(dtype: str) -> None:
    x, multiplier, bias = bytes_and_affine((2, 3, 8, 8), dtype)
    step = one_step.quantpack(x, scale=60.0, bits=8, zero=117, multiplier=multiplier, bias=bias)
    codes = step.run("reference")
    for place in np.ndindex(2, 8, 8, 3):
        image, row, column, channel = place
        exact = Fraction(float(x[image, channel, row, column])) * Fraction(float(multiplier[channel]))
        value = float32_of(exact + Fraction(float(bias[channel])))
        assert int(codes[place]) == scalar_code(value, 60.0, 8, 117, False)


def float32_of(exact: Fraction) -> float:
    """The nearest float32, found among the neighbours of a double rounding; no ties occur here."""
    guess = np.float32(float(exact))
    near = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return float(min(near, key=lambda one: abs(Fraction(float(one)) - exact)))


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", IMAGES)
def test_bytes_and_memory_formats_equal_the_reference(
    shape: tuple[int, int, int, int], affine: bool, dtype: str, backend: str, device: str
) -> None:
    x, multiplier, bias = bytes_and_affine(shape, dtype)
    options: dict[str, object] = {"scale": 60.0 if affine else 1.0, "bits": 8, "zero": 117 if affine else 0}
    options.update({"multiplier": multiplier, "bias": bias} if affine else {})
    expected = one_step.quantpack(x, **options).run("reference")  # type: ignore[arg-type]
    for layout in (torch.contiguous_format, torch.channels_last):
        with filled_memory():
            given = x.contiguous(memory_format=layout)
            actual = one_step.quantpack(given, **options).run(backend, device)  # type: ignore[arg-type]
        assert_same(actual, expected, f"codes of {layout}")
    if x.numel() > 100:
        assert float(((expected > 0) & (expected < 255)).float().mean()) > 0.3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards memory with mprotect")
def test_nothing_is_read_past_the_end_of_an_image() -> None:
    """Images end where a page ends, and the next page may not be read: a byte too far would kill the process."""
    code = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, {tests!r})
from lbs_kernels import extension
from one_step import quantpack
from test_quantpack import IMAGES, bytes_and_affine
pages = mmap.mmap(-1, 16 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(start + 15 * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
for shape in IMAGES:
    for dtype in ("uint8", "float32"):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, multiplier, bias = bytes_and_affine(shape, dtype)
            x = x.contiguous(memory_format=layout)
            size = x.numel() * x.element_size()
            guarded = torch.frombuffer(pages, dtype=x.dtype, count=x.numel(), offset=15 * mmap.PAGESIZE - size)
            guarded = guarded.as_strided(x.shape, x.stride())
            guarded.copy_(x)
            options = dict(scale=60.0, bits=8, zero=117, multiplier=multiplier, bias=bias)
            expected = quantpack(x, **options).run("reference")
            assert torch.equal(quantpack(guarded, **options).run("cpu"), expected)
"""
    if why_not("cpu", "cpu") is not None:
        pytest.skip(str(why_not("cpu", "cpu")))
    code = code.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_codes_go_to_planes_and_back() -> None:
    x = torch.randn(2, 33, 3, 3)
    codes = one_step.quantpack(x, scale=1.5, bits=4).run("auto")
    assert torch.equal(unpack_planes(pack_planes(codes, 4), 4, 33), codes)


def test_strides_do_not_matter() -> None:
    def codes(image: Tensor) -> Tensor:
        return one_step.quantpack(image, scale=2.0, bits=4, zero=7).run("auto")

    x = torch.randn(2, 3, 5, 4)
    expected = codes(x)
    assert_same(codes(x.to(memory_format=torch.channels_last)), expected, "codes")
    assert_same(codes(x.transpose(2, 3)), expected.transpose(1, 2), "codes")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nothing_to_encode(backend: str) -> None:
    codes = one_step.quantpack(torch.zeros(0, 3, 4, 5), scale=1.0, bits=2).run(backend)
    assert codes.shape == (0, 4, 5, 3)
    assert codes.dtype == torch.uint8


def test_operands_that_do_not_fit_are_refused() -> None:
    def refused(message: str, size: tuple[int, int] = (3, 4), **options: object) -> None:
        x = torch.zeros(1, 2, *size)
        with pytest.raises(FormatError, match=message):
            one_step.quantpack(x, **{"scale": 1.0, "bits": 4, **options}).run("auto")  # type: ignore[arg-type]

    refused("height = 0; sizes are 1 to", (0, 5))
    for scale in (0.0, -1.0, 0.1, 1e300):
        refused("positive and exact in float32", scale=scale)
    for scale in (float("inf"), float("nan")):
        refused("positive and exact in float32|Infinity|NaN|finite", scale=scale)
    refused("0 bits", bits=0)
    refused("signed with zero = 1", zero=1, signed=True)
    two = torch.ones(2)
    refused("only one of multiplier and bias", bias=two)
    for wrong in (torch.ones(3), two.to(torch.int32), torch.ones(2, 1)):
        refused(r"'multiplier' is .*; the step needs float32 \(2,\)", multiplier=wrong, bias=two)
