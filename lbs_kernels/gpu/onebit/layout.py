"""How the one-bit kernels keep weights and thresholds: the order in which shared memory wants them.

K is flattened over (tap, word) and cut into chunks of 16 words (512 bits). A chunk of one filter and of planes 2 j and
2 j + 1 is a row of 128 bytes, eight units of 16:

    unit 4 p + u = words 4 u .. 4 u + 3 of plane 2 j + p,   stored at place (4 p + u) ^ (column % 8)

Columns of a block of B filters are ordered such that a thread of the tensor core holds B / 4 neighbouring channels:

    channel(column) = column // 2 % 4 * (B // 4) + column // 8 * 2 + column % 2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError

CHUNK_WORDS = 16
UNIT_WORDS = 4
SWIZZLE = 8  # rows after which the order of units repeats


def channel_order(block_o: int) -> Tensor:
    """int64 [block_o]: the channel, inside its block, of every column."""
    column = torch.arange(block_o)
    return column // 2 % 4 * (block_o // 4) + column // 8 * 2 + column % 2


@dataclass(frozen=True)
class OneBitLayout:
    """Weights of one layer for blocks of `block_o` filters; `inverse(forward(planes)) == planes`."""

    w_bits: int  # even
    filters: int
    taps: int
    words: int
    block_o: int

    @property
    def blocks(self) -> int:
        return -(-self.filters // self.block_o)

    @property
    def slots(self) -> int:
        """Filters rounded up to whole blocks: the length of every per-filter array of the kernel."""
        return self.blocks * self.block_o

    @property
    def chunks(self) -> int:
        return -(-self.taps * self.words // CHUNK_WORDS)

    @property
    def shape(self) -> tuple[int, ...]:
        """[pairs of planes, blocks, chunks, columns, words]."""
        return self.w_bits // 2, self.blocks, self.chunks, self.block_o, 2 * CHUNK_WORDS

    def forward(self, planes: Tensor) -> Tensor:
        """int32 of `shape` from planes int32 [w_bits, O, T, CW]; filters and words that do not exist are 0."""
        expected = (self.w_bits, self.filters, self.taps, self.words)
        if planes.dtype != torch.int32 or tuple(planes.shape) != expected:
            raise FormatError(
                f"planes are {planes.dtype} {list(planes.shape)}; the layout was made for int32 {list(expected)}"
            )
        flat = planes.flatten(2)
        padding = (0, self.chunks * CHUNK_WORDS - flat.shape[2], 0, self.slots - self.filters)
        padded = torch.nn.functional.pad(flat, padding)
        parts = padded.reshape(self.w_bits // 2, 2, self.blocks, self.block_o, self.chunks, CHUNK_WORDS)
        rows = parts.permute(0, 2, 4, 3, 1, 5)[:, :, :, channel_order(self.block_o)]
        return self._swizzled(rows.reshape(self.shape))

    def inverse(self, laid_out: Tensor) -> Tensor:
        """Planes int32 [w_bits, O, T, CW] of what `forward` made."""
        rows = self._swizzled(laid_out).reshape(*self.shape[:-1], 2, CHUNK_WORDS)  # the swizzle undoes itself
        by_channel = torch.empty_like(rows)
        by_channel[:, :, :, channel_order(self.block_o)] = rows
        flat = by_channel.permute(0, 4, 1, 3, 2, 5).reshape(self.w_bits, self.slots, self.chunks * CHUNK_WORDS)
        kept = flat[:, : self.filters, : self.taps * self.words]
        return kept.reshape(self.w_bits, self.filters, self.taps, self.words).contiguous()

    def _swizzled(self, rows: Tensor) -> Tensor:
        units = rows.reshape(*self.shape[:-1], SWIZZLE, UNIT_WORDS)
        place = torch.arange(SWIZZLE) ^ (torch.arange(self.block_o) % SWIZZLE).unsqueeze(1)  # [columns, units]
        index = place[..., None].expand(*units.shape).to(rows.device)
        return units.gather(-2, index).reshape(self.shape)

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
