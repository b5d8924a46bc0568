"""How the CUDA kernels keep weights and thresholds: the order in which shared memory wants them.

A chunk of K of one filter is a row of 128 bytes, eight units of 16; unit u of column c is stored at place u ^ (c % 8).
Columns of a block of B filters are ordered such that a thread of the tensor core holds B / 4 neighbouring channels:

    channel(column) = column // 2 % 4 * (B // 4) + column // 8 * 2 + column % 2

One-bit kernels flatten K over (tap, word) and cut it into chunks of 16 words. A row holds planes 2 j and 2 j + 1:

    unit 4 p + u = words 4 u .. 4 u + 3 of plane 2 j + p

The s8 kernels flatten it over (tap, channel), channels padded to 16 for each tap, and cut it into chunks of 128 bytes.
Bytes of filters and channels that do not exist are 0. Kernels that sum codes find eight more columns in every block,
which hold 1 where a channel exists. Where activations are nibbles, every 32 bytes of a row are in the order in which
threads expand them: thread t of four has word t of 16 bytes, its low halves in front, the high ones behind all of them.

    byte 16 h + 4 t + j of 32 = what would be byte 8 t + 4 h + j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.gpu.layout import byte_pitch

ROW_BYTES = 128
UNIT_BYTES = 16
SWIZZLE = 8  # rows after which the order of units repeats
SUM_COLUMNS = 8
CHUNK_WORDS = 16


def channel_order(block_o: int) -> Tensor:
    """int64 [block_o]: the channel, inside its block, of every column."""
    column = torch.arange(block_o)
    return column // 2 % 4 * (block_o // 4) + column // 8 * 2 + column % 2


def swizzled(rows: Tensor) -> Tensor:
    """Rows of 128 bytes [..., columns, 128] with their units at their places, and the other way round."""
    units = rows.reshape(*rows.shape[:-1], SWIZZLE, UNIT_BYTES)
    place = torch.arange(SWIZZLE) ^ (torch.arange(rows.shape[-2]) % SWIZZLE).unsqueeze(1)  # [columns, units]
    return units.gather(-2, place[..., None].expand(*units.shape)).reshape(rows.shape)


@dataclass(frozen=True)
class FilterBlocks:
    """Filters in blocks of `block_o`, and what a kernel reads for each of them."""

    filters: int
    block_o: int

    @property
    def blocks(self) -> int:
        return -(-self.filters // self.block_o)

    @property
    def slots(self) -> int:
        """Filters rounded up to whole blocks: the length of every per-filter array of the kernel."""
        return self.blocks * self.block_o

    def per_filter(self, values: Tensor) -> Tensor:
        """[..., O] padded with zeros to [..., slots]."""
        return torch.nn.functional.pad(values, (0, self.slots - self.filters)).contiguous()

    def threshold_tables(self, levels: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel compares with, from `epilogue.thresholds`.

        Args:
            levels: int32 [O, n].
            flip: bool [O]; `acc <= T` is compared as `~acc >= ~T`.

        Returns:
            int32 [blocks, n, block_o], and one bit per filter slot in int32 words.
        """
        turned = torch.where(flip.unsqueeze(1), ~levels, levels)
        table = self.per_filter(turned.T).reshape(-1, self.blocks, self.block_o).transpose(0, 1).contiguous()
        lanes = self.per_filter(flip.to(torch.int32)).reshape(-1, 32)
        bits = (lanes << torch.arange(32, dtype=torch.int32, device=lanes.device)).sum(dim=1, dtype=torch.int32)
        return table, bits

    def to_columns(self, rows: Tensor) -> Tensor:
        """uint8 [..., block_o channels, 128] in the order of columns, swizzled."""
        return swizzled(rows[..., channel_order(self.block_o), :])

    def to_channels(self, columns: Tensor) -> Tensor:
        """The inverse of `to_columns`."""
        rows = swizzled(columns)  # the swizzle undoes itself
        by_channel = torch.empty_like(rows)
        by_channel[..., channel_order(self.block_o), :] = rows
        return by_channel

    def _check(self, given: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if given.dtype != dtype or tuple(given.shape) != shape:
            raise FormatError(
                f"weights are {given.dtype} {list(given.shape)}; the layout was made for {dtype} {list(shape)}"
            )


@dataclass(frozen=True)
class OneBitLayout(FilterBlocks):
    """Planes of one layer; `inverse(forward(planes)) == planes`."""

    w_bits: int  # even
    taps: int
    words: int

    @property
    def chunks(self) -> int:
        return -(-self.taps * self.words // CHUNK_WORDS)

    @property
    def shape(self) -> tuple[int, ...]:
        """[pairs of planes, blocks, chunks, columns, words]."""
        return self.w_bits // 2, self.blocks, self.chunks, self.block_o, 2 * CHUNK_WORDS

    def forward(self, planes: Tensor) -> Tensor:
        """int32 of `shape` from planes int32 [w_bits, O, T, CW]; filters and words that do not exist are 0."""
        self._check(planes, torch.int32, (self.w_bits, self.filters, self.taps, self.words))
        flat = planes.flatten(2)
        padding = (0, self.chunks * CHUNK_WORDS - flat.shape[2], 0, self.slots - self.filters)
        padded = torch.nn.functional.pad(flat, padding)
        parts = padded.reshape(self.w_bits // 2, 2, self.blocks, self.block_o, self.chunks, CHUNK_WORDS)
        rows = parts.permute(0, 2, 4, 3, 1, 5).reshape(self.shape)
        return self.to_columns(rows.view(torch.uint8)).view(torch.int32)

    def inverse(self, laid_out: Tensor) -> Tensor:
        """Planes int32 [w_bits, O, T, CW] of what `forward` made."""
        by_channel = self.to_channels(laid_out.contiguous().view(torch.uint8)).view(torch.int32)
        parts = by_channel.reshape(*self.shape[:-1], 2, CHUNK_WORDS)
        flat = parts.permute(0, 4, 1, 3, 2, 5).reshape(self.w_bits, self.slots, self.chunks * CHUNK_WORDS)
        kept = flat[:, : self.filters, : self.taps * self.words]
        return kept.reshape(self.w_bits, self.filters, self.taps, self.words).contiguous()


@dataclass(frozen=True)
class S8Layout(FilterBlocks):
    """Signed bytes of one layer; `inverse(forward(weights)) == weights`."""

    taps: int
    channels: int
    sums: bool = False
    nibbles: bool = False  # the activations

    @property
    def chunks(self) -> int:
        return -(-self.taps * byte_pitch(self.channels) // ROW_BYTES)

    @property
    def shape(self) -> tuple[int, ...]:
        """[blocks, chunks, columns, bytes]."""
        return self.blocks, self.chunks, self.block_o + (SUM_COLUMNS if self.sums else 0), ROW_BYTES

    def forward(self, weights: Tensor) -> Tensor:
        """int8 of `shape` from int8 [O, T, C]."""
        self._check(weights, torch.int8, (self.filters, self.taps, self.channels))
        padded = torch.nn.functional.pad(self._flat(weights), (0, 0, 0, self.slots - self.filters))
        rows = padded.reshape(self.blocks, self.block_o, self.chunks, ROW_BYTES).transpose(1, 2)
        columns = self.to_columns(rows)
        if not self.sums:
            return columns
        ones = self._flat(torch.ones_like(weights[:1])).reshape(self.chunks, 1, ROW_BYTES)
        ones = swizzled(ones.expand(self.blocks, self.chunks, SUM_COLUMNS, ROW_BYTES))
        return torch.cat([columns, ones], dim=2)

    def _flat(self, weights: Tensor) -> Tensor:
        """[O, bytes of all chunks] of [O, T, C]."""
        flat = torch.nn.functional.pad(weights, (0, byte_pitch(self.channels) - self.channels)).flatten(1)
        flat = torch.nn.functional.pad(flat, (0, self.chunks * ROW_BYTES - flat.shape[1]))
        return flat.unflatten(1, (-1, 4, 2, 4)).transpose(2, 3).flatten(1) if self.nibbles else flat

    def inverse(self, laid_out: Tensor) -> Tensor:
        """int8 [O, T, C] of what `forward` made."""
        flat = (
            self.to_channels(laid_out[:, :, : self.block_o])
            .transpose(1, 2)
            .reshape(self.slots, self.chunks * ROW_BYTES)
        )
        if self.nibbles:
            flat = flat.unflatten(1, (-1, 2, 4, 4)).transpose(2, 3).flatten(1)
        pitch = byte_pitch(self.channels)
        kept = flat[: self.filters, : self.taps * pitch].reshape(self.filters, self.taps, pitch)
        return kept[..., : self.channels].contiguous()
