"""How the implicit GEMM keeps weights: tiles of the reduction, as int8 bytes or as narrow fields. Needs no Triton.

The reduction runs in steps of one word block (BLOCK_WORDS words of 32 channels) and BLOCK_TAPS taps, taps innermost. A
tile holds what one step multiplies, for every filter, tap after tap, each weight in `width` bits:

    tiles int32 [steps, rows, BLOCK_TAPS * BLOCK_WORDS * width],   steps = word blocks * ceil(T / BLOCK_TAPS)

Rows, words and taps are padded to whole blocks.

Inside a word of 32 channels the products may be summed in any order that both operands share. It is the order in which
the activations come out of their GPU form, 4 bytes to a register:

    bytes    position 4 j + i is channel 4 j + i
    planes   position 4 j + i is channel 8 i + j    ((plane >> j) & 0x01010101 holds channels j, 8 + j, 16 + j, 24 + j)

A field keeps the code in its upper bits with the highest one inverted, so that one AND leaves the weight of the grid
with a zero times a power of two, the byte (q - 2^(bits - 1)) << (8 - bits), and one OR makes it that of the odd grid,
(2 q - n) << (7 - bits):

    word v of a row, field f = 2 or 4 bits, h = 0 .. 8 / f - 1:
    ((v << (h f)) & keep) | one,   keep = bits 7 .. 8 - bits and one = bit 7 - bits of every byte
    are the positions 32 / f * v + 4 h .. + 3

A byte holds q - 2^(bits - 1), or 2 q - n on the odd grid below 8 bits. Padding is 0 in bytes; fields of the odd grid
have no 0, so fields need activations that are 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program.planes import MAX_BITS, WORD, weight_units, words

FIELD_BITS = 4  # codes of more bits are kept as bytes


def field_width(bits: int) -> int:
    """Bits of the narrowest field that holds a code of `bits` bits (at most 4)."""
    return 2 if bits <= 2 else FIELD_BITS


def field_shift(bits: int, grid: str) -> int:
    """A field becomes its centred weight times 2 to this power."""
    return MAX_BITS - bits - (grid == "odd")


def channel_order(a_bits: int) -> Tensor:
    """int64 [32]: the channel at each position of a word, for activations of `a_bits` bits."""
    position = torch.arange(WORD)
    return position if a_bits == MAX_BITS else position % 4 * 8 + position // 4


def byte_units(bits: int, grid: str) -> tuple[int, int]:
    """(scale, shift): the byte that is multiplied is scale * q + shift; 2 q - 255 would be no byte, q - 128 is."""
    return weight_units(bits, "zero" if bits == MAX_BITS else grid)


def centre_bytes(codes: Tensor, bits: int, grid: str) -> Tensor:
    """uint8 codes as the signed bytes that are multiplied (`byte_units`), viewed as uint8."""
    scale, shift = byte_units(bits, grid)
    return (scale * codes.to(torch.int16) + shift).to(torch.int8).view(torch.uint8)


def uncentre_bytes(byte: Tensor, bits: int, grid: str) -> Tensor:
    """The inverse of `centre_bytes`."""
    scale, shift = byte_units(bits, grid)
    return ((byte.contiguous().view(torch.int8).to(torch.int16) - shift) // scale).to(torch.uint8)


@dataclass(frozen=True)
class WeightTiles:
    """One layout: codes uint8 [O, T, C] <-> int32 tiles; `codes` is the exact inverse of `tiles`."""

    bits: int
    a_bits: int  # of the activations, whose order the channels follow
    fields: bool  # else bytes
    block_rows: int
    block_words: int
    block_taps: int = 1
    grid: str = "odd"

    @property
    def width(self) -> int:
        """Bits that one weight takes."""
        return field_width(self.bits) if self.fields else MAX_BITS

    def tiles(self, codes: Tensor) -> Tensor:
        """int32 [steps, rows, block_taps block_words width] of codes uint8 [O, T, C]."""
        filters, taps, channels = codes.shape
        rows, blocks, groups = self._counts(filters, taps, channels)
        size = WORD * self.block_words
        byte = torch.zeros(rows, groups * self.block_taps, blocks * size, dtype=torch.uint8)
        byte[:filters, :taps, :channels] = self._encode(codes)
        byte = byte.reshape(rows, groups, self.block_taps, blocks, self.block_words, WORD)
        byte = byte[..., channel_order(self.a_bits)].permute(3, 1, 0, 2, 4, 5)
        byte = byte.reshape(blocks * groups, rows, self.block_taps * size)
        if not self.fields:
            return byte.contiguous().view(torch.int32)
        per_byte = MAX_BITS // self.width
        lanes = byte.reshape(blocks * groups, rows, -1, per_byte, 4).to(torch.int32)
        shift = (torch.arange(per_byte, dtype=torch.int32) * self.width).reshape(per_byte, 1)
        return (lanes >> shift).sum(dim=-2).to(torch.uint8).contiguous().view(torch.int32).squeeze(-1)

    def codes(self, tiles: Tensor, filters: int, taps: int, channels: int) -> Tensor:
        """uint8 [O, T, C], the inverse of `tiles`.

        Raises:
            FormatError: tiles of another size.
        """
        rows, blocks, groups = self._counts(filters, taps, channels)
        expected = (blocks * groups, rows, self.block_taps * self.block_words * self.width)
        if tuple(tiles.shape) != expected:
            raise FormatError(
                f"weight tiles have shape {tuple(tiles.shape)}; {self} of {filters} filters is {expected}"
            )
        byte = tiles.contiguous().view(torch.uint8).reshape(blocks * groups, rows, -1, 1, 4)
        if self.fields:
            per_byte = MAX_BITS // self.width
            shift = (torch.arange(per_byte) * self.width).reshape(per_byte, 1)
            byte = (byte.long() << shift) & 0xFF
        byte = byte.reshape(blocks, groups, rows, self.block_taps, self.block_words, WORD)
        byte = byte[..., channel_order(self.a_bits).argsort()].permute(2, 1, 3, 0, 4, 5)
        byte = byte.reshape(rows, groups * self.block_taps, -1)
        return self._decode(byte[:filters, :taps, :channels].to(torch.uint8))

    def _counts(self, filters: int, taps: int, channels: int) -> tuple[int, int, int]:
        """Padded rows, word blocks, groups of taps."""
        rows = -(-filters // self.block_rows) * self.block_rows
        return rows, -(-words(channels) // self.block_words), -(-taps // self.block_taps)

    def _encode(self, codes: Tensor) -> Tensor:
        """The byte of each code: what is multiplied, or a field in the upper bits of a byte."""
        if self.fields:
            top = 1 << (self.bits - 1)
            return (codes ^ top) << (MAX_BITS - self.bits)
        return centre_bytes(codes, self.bits, self.grid)

    def _decode(self, byte: Tensor) -> Tensor:
        if self.fields:
            return (byte >> (MAX_BITS - self.bits)) ^ (1 << (self.bits - 1))
        return uncentre_bytes(byte, self.bits, self.grid)
