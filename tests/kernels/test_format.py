from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbs_kernels.errors import FormatError
from lbs_kernels.program.planes import (
    check_accumulator,
    pack_planes,
    pack_weights,
    unpack_planes,
    unpack_weights,
    words,
)

CHANNELS = [1, 13, 31, 32, 33, 63, 64, 65]  # one, odd, word -1, word, word +1, and the same around two words


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("channels", CHANNELS)
def test_planes_round_trip(bits: int, channels: int) -> None:
    codes = random_codes((3, 2, channels), bits)
    planes = pack_planes(codes, bits)
    assert planes.dtype == torch.int32
    assert planes.shape == (3, 2, bits, words(channels))
    assert torch.equal(unpack_planes(planes, bits, channels), codes)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    channels=st.integers(1, 100),
    lead=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_planes_round_trip_of_any_shape(bits: int, channels: int, lead: list[int], seed: int) -> None:
    codes = random_codes((*lead, channels), bits, seed)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits, channels), codes)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    seed=st.integers(0, 2**31),
)
def test_weights_round_trip(bits: int, shape: tuple[int, int, int, int], seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    planes = pack_weights(codes, bits)
    filters, rows, columns, channels = shape
    assert planes.shape == (bits, filters, rows * columns, words(channels))
    assert planes.is_contiguous()
    assert torch.equal(unpack_weights(planes, channels), codes.reshape(filters, rows * columns, channels))


@pytest.mark.parametrize("channel", [0, 1, 30, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("plane", [0, 1, 7])
def test_one_hot_pins_the_bit_order(channel: int, plane: int) -> None:
    codes = torch.zeros(65, dtype=torch.uint8)
    codes[channel] = 1 << plane
    expected = torch.zeros(8, 3, dtype=torch.int64)
    expected[plane, channel // 32] = 1 << (channel % 32)
    assert torch.equal(pack_planes(codes, 8).to(torch.int64) & 0xFFFFFFFF, expected)


def test_one_hot_pins_the_tap_order() -> None:
    codes = torch.zeros(2, 3, 3, 40, dtype=torch.uint8)
    codes[1, 2, 0, 35] = 2  # row 2, column 0 is tap 6
    planes = pack_weights(codes, 2)
    assert planes[1, 1, 6, 1] == 1 << 3
    assert int((planes != 0).sum()) == 1


def test_layout_does_not_depend_on_strides() -> None:
    codes = random_codes((4, 5, 33), 4)
    transposed = codes.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert torch.equal(pack_planes(transposed, 4), pack_planes(codes, 4))
    planes = pack_planes(codes, 4)
    assert torch.equal(unpack_planes(planes.transpose(0, 1).contiguous().transpose(0, 1), 4, 33), codes)


@pytest.mark.parametrize("channels", [1, 31, 33])
def test_garbage_in_unused_bits_is_refused(channels: int) -> None:
    planes = pack_planes(random_codes((2, channels), 2), 2)
    planes[1, 0, -1] |= 1 << (channels % 32)
    with pytest.raises(FormatError, match=f"beyond channel {channels - 1}"):
        unpack_planes(planes, 2, channels)
    with pytest.raises(FormatError, match="unused bits"):
        unpack_weights(planes[:, :, None, :].permute(1, 0, 2, 3), channels)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="largest code is 4; 2 bits hold 0 to 3"):
        pack_planes(torch.tensor([0, 4], dtype=torch.uint8), 2)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_illegal_bits_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match="1 to 8 bits"):
        pack_planes(torch.zeros(3, dtype=torch.uint8), bits)


def test_other_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(FormatError, match=r"torch\.float32"):
        pack_planes(torch.zeros(3), 2)
    with pytest.raises(FormatError, match="scalar"):
        pack_planes(torch.tensor(1, dtype=torch.uint8), 2)
    with pytest.raises(FormatError, match=r"need \[\.\.\., 2, 2\]"):
        unpack_planes(torch.zeros(5, 2, 1, dtype=torch.int32), 2, 33)
    with pytest.raises(FormatError, match="int32 words"):
        unpack_planes(torch.zeros(5, 2, 1, dtype=torch.int64), 2, 3)
    with pytest.raises(FormatError, match="kh, kw, C"):
        pack_weights(torch.zeros(3, 2, dtype=torch.uint8), 2)


def test_accumulator_guard_is_exact() -> None:
    # 255 * 255 * 33025 = 2147450625 < 2^31 = 2147483648 <= 255 * 255 * 33026
    check_accumulator(33025, 8, 8, "fits")
    with pytest.raises(FormatError, match="sum to 2147483648"):
        check_accumulator(1 << 31, 1, 1, "exactly 2^31")
    with pytest.raises(FormatError, match=r"33026 products .* 255 .* 255 .* 2147515650"):
        check_accumulator(33026, 8, 8, "wide")
