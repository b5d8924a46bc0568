"""How the GPU kernels keep weights: exact inverses, and the bytes that the unpacking in registers yields."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from lbs_kernels.errors import FormatError
from lbs_kernels.gpu.triton.depthwise import TapRegisters
from lbs_kernels.gpu.weights import WeightTiles, channel_order, field_shift


def random_codes(*shape: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + bits)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


# One filter and channel; 13 of 64 filters; channels a word -1, +0, +1; a tail of a block of four words.
@pytest.mark.parametrize(
    ("filters", "taps", "channels"), [(1, 1, 1), (13, 9, 31), (64, 1, 32), (65, 4, 33), (16, 3, 130)]
)
@pytest.mark.parametrize(("bits", "fields"), [(b, f) for b in range(1, 9) for f in (True, False) if b <= 4 or not f])
def test_tiles_have_an_exact_inverse(bits: int, fields: bool, filters: int, taps: int, channels: int) -> None:
    codes = random_codes(filters, taps, channels, bits=bits)
    for a_bits, words, together in ((4, 1, 1), (8, 4, 1), (4, 2, 4), (8, 1, 2)):
        for grid in ("odd", "zero"):
            layout = WeightTiles(bits, a_bits, fields, 32, words, together, grid)
            tiles = layout.tiles(codes)
            steps = -(-channels // (32 * words)) * -(-taps // together)
            assert tuple(tiles.shape) == (steps, -(-filters // 32) * 32, together * words * layout.width)
            assert torch.equal(layout.codes(tiles, filters, taps, channels), codes)


def test_taps_of_a_step_lie_side_by_side() -> None:
    codes = random_codes(16, 9, 32, bits=4)
    one = WeightTiles(4, 4, False, 16, 1).tiles(codes)  # [9, 16, 8]
    four = WeightTiles(4, 4, False, 16, 1, block_taps=4).tiles(codes)  # [3, 16, 32]
    for tap in range(9):
        assert torch.equal(four[tap // 4, :, tap % 4 * 8 : tap % 4 * 8 + 8], one[tap])


@pytest.mark.parametrize("grid", ["odd", "zero"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fields_become_weights_times_a_power_of_two(bits: int, grid: str) -> None:
    """One AND and, on the odd grid, one OR for each register, as the kernel does it: the bytes of the other layout."""
    codes = random_codes(32, 9, 64, bits=bits)
    fields = WeightTiles(bits, 8, True, 32, 2, grid=grid)
    words = fields.tiles(codes)  # [9, 32, V]
    keep = int.from_bytes(bytes([256 - (1 << (8 - bits))] * 4), "little")
    one = int.from_bytes(bytes([1 << (7 - bits)] * 4), "little") if grid == "odd" else 0
    registers = [((words.long() << (h * fields.width)) & keep) | one for h in range(8 // fields.width)]
    actual = torch.stack(registers, dim=-1).to(torch.int32).contiguous().view(torch.int8).reshape(9, 32, 64)
    plain = WeightTiles(bits, 8, False, 32, 2, grid=grid).tiles(codes).view(torch.int8)
    assert torch.equal(actual.int(), plain.int() << field_shift(bits, grid))


@pytest.mark.parametrize("a_bits", [4, 8])
def test_channels_follow_the_activations(a_bits: int) -> None:
    assert sorted(channel_order(a_bits).tolist()) == list(range(32))
    codes = torch.zeros(1, 1, 32, dtype=torch.uint8)
    codes[0, 0, 9] = 255  # q - 128 is 127 there, -128 elsewhere
    byte = WeightTiles(8, a_bits, False, 1, 1).tiles(codes).view(torch.int8).flatten()
    # Plane words give channel 9 as byte 1 of register 1, bytes as byte 1 of register 2.
    assert byte.argmax() == {4: 4 * 1 + 1, 8: 9}[a_bits]


@pytest.mark.parametrize(("channels", "taps"), [(1, 1), (31, 9), (32, 4), (33, 25)])
@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_tap_registers_have_an_exact_inverse(bits: int, channels: int, taps: int) -> None:
    codes = random_codes(channels, taps, bits=bits)
    for a_bits in (2, 8):
        for grid in ("odd", "zero"):
            layout = TapRegisters(bits, a_bits, grid)
            registers = layout.registers(codes)
            assert tuple(registers.shape) == (-(-taps // 4), 4, 8 * (-(-channels // 32)))
            assert torch.equal(layout.codes(registers, channels, taps), codes)


def test_other_sizes_are_refused() -> None:
    codes = random_codes(8, 1, 32, bits=4)
    layout = WeightTiles(4, 4, True, 16, 1)
    with pytest.raises(FormatError, match=r"weight tiles have shape \(1, 16, 4\)"):
        layout.codes(layout.tiles(codes), 17, 1, 32)
    taps = TapRegisters(4, 4)
    with pytest.raises(FormatError, match=r"registers have shape \(3, 4, 8\); 32 channels of 4 taps"):
        taps.codes(taps.registers(random_codes(32, 9, bits=4)), 32, 4)
