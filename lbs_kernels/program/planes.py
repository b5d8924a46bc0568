"""Bit-planes: how codes lie in 32-bit words, on disk and in every test.

    word(c) = c // 32,  bit(c) = c % 32,  CW = ceil(C / 32)
    plane p, word w = sum over j of ((code[32 w + j] >> p) & 1) << j

Unused bits (channels C .. 32 CW - 1) are 0. Planes run from the least significant bit upwards. A back end may keep the
same numbers in another order; this is the only order that is stored.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError

FORMAT_VERSION = 1
WORD = 32
MAX_BITS = 8
_CACHED = 1 << 15  # codes worked on at once: 8 planes of int32 are 1 MB


def words(channels: int) -> int:
    """CW: 32-bit words that hold one bit of each of `channels` channels."""
    return -(-channels // WORD)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit-planes of activation codes.

    Args:
        codes: uint8 [..., C], values 0 .. 2^bits - 1.
        bits: planes to write, 1 .. 8.

    Returns:
        int32 [..., bits, CW].

    Raises:
        FormatError: another dtype, no channel dimension, illegal bits, or a code that does not fit.

    >>> pack_planes(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=2)
    tensor([[5],
            [6]], dtype=torch.int32)
    """
    _check_codes(codes, bits)
    channels = codes.shape[-1]
    planes = torch.empty(*codes.shape[:-1], bits, words(channels), dtype=torch.int32, device=codes.device)
    if planes.numel():
        for part, target in _parts(codes.reshape(-1, channels), planes.view(-1, bits, words(channels))):
            target.copy_(_packed(part, bits))
    return planes


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, bits, CW] of codes uint8 [R, C]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % WORD)).to(torch.int32)
    lanes = padded.reshape(len(codes), 1, -1, WORD)
    planes = torch.arange(bits, dtype=torch.int32, device=codes.device).reshape(bits, 1, 1)
    lane = torch.arange(WORD, dtype=torch.int32, device=codes.device)
    # The bits of one word are disjoint, so the sum is an OR; bit 31 makes the word negative without overflowing.
    return (((lanes >> planes) & 1) << lane).sum(dim=-1, dtype=torch.int32)


def _parts(codes: Tensor, planes: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Rows of codes [R, C] and of planes [R, bits, CW] side by side: so many that one word per bit stays in cache."""
    rows = max(1, _CACHED // codes.shape[1]) if codes.device.type == "cpu" else len(codes)
    return zip(codes.split(rows), planes.split(rows), strict=True)


def unpack_planes(planes: Tensor, bits: int, channels: int) -> Tensor:
    """Codes of activation planes, the inverse of `pack_planes`.

    Args:
        planes: int32 [..., bits, CW].
        bits: planes per code.
        channels: C, with CW = ceil(C / 32).

    Returns:
        uint8 [..., C].

    Raises:
        FormatError: another dtype or shape, or bits set beyond channel C - 1.
    """
    _check_bits(bits)
    if planes.dtype != torch.int32:
        raise FormatError(f"planes are {planes.dtype}; the format stores int32 words, convert before unpacking")
    if planes.dim() < 2 or tuple(planes.shape[-2:]) != (bits, words(channels)):
        raise FormatError(
            f"planes have shape {tuple(planes.shape)}; {bits}-bit codes of {channels} channels need "
            f"[..., {bits}, {words(channels)}]"
        )
    codes = torch.empty(*planes.shape[:-2], channels, dtype=torch.uint8, device=planes.device)
    if not codes.numel():
        return codes
    lane = torch.arange(WORD, dtype=torch.int32, device=planes.device)
    weights = (1 << torch.arange(bits, dtype=torch.int32, device=planes.device)).unsqueeze(-1)
    for target, part in _parts(codes.view(-1, channels), planes.reshape(-1, bits, words(channels))):
        lanes = ((part.unsqueeze(-1) >> lane) & 1).flatten(-2)  # [R, bits, CW * 32]
        if bool(lanes[..., channels:].any()):
            raise FormatError(
                f"bits are set beyond channel {channels - 1}; unused bits must be 0, the planes are damaged"
            )
        target.copy_((lanes[..., :channels] * weights).sum(dim=-2, dtype=torch.int32))
    return codes


def pack_weights(codes: Tensor, bits: int) -> Tensor:
    """Weight planes of a convolution (or of a linear layer with kh = kw = 1).

    Args:
        codes: uint8 [O, kh, kw, C], C being the channels of ONE group.
        bits: 1 .. 8.

    Returns:
        int32 [bits, O, T, CW] with T = kh * kw taps in (row, column) order.

    Raises:
        FormatError: as `pack_planes`, or not four dimensions.
    """
    if codes.dim() != 4:
        raise FormatError(f"weight codes have shape {tuple(codes.shape)}; expected [O, kh, kw, C]")
    filters, rows, columns, channels = codes.shape
    planes = pack_planes(codes.reshape(filters, rows * columns, channels), bits)
    return planes.permute(2, 0, 1, 3).contiguous()


def unpack_weights(planes: Tensor, channels: int) -> Tensor:
    """Weight codes uint8 [O, T, C] of planes int32 [bits, O, T, CW], the inverse of `pack_weights`.

    Raises:
        FormatError: another dtype or shape, or bits set beyond channel C - 1.
    """
    if planes.dim() != 4:
        raise FormatError(f"weight planes have shape {tuple(planes.shape)}; expected [bits, O, T, CW]")
    return unpack_planes(planes.permute(1, 2, 0, 3), planes.shape[0], channels)


def weight_units(bits: int, grid: str) -> tuple[int, int]:
    """(scale, shift): a weight code q counts as scale * q + shift in the accumulator.

    2 q - n on the grid `odd`, which has no zero; q - 2^(bits - 1) on the grid `zero`.
    """
    return (2, 1 - (1 << bits)) if grid == "odd" else (1, -(1 << (bits - 1)))


def accumulator_fits(reduction: int, w_bits: int, a_bits: int) -> bool:
    """Whether K products always fit an int32: K * n_w * n_x < 2^31, n = 2^bits - 1."""
    return reduction * ((1 << w_bits) - 1) * ((1 << a_bits) - 1) < 1 << 31


def check_accumulator(reduction: int, w_bits: int, a_bits: int, name: str) -> None:
    """Refuse a layer whose int32 accumulator could overflow: K * n_w * n_x < 2^31, n = 2^bits - 1.

    Raises:
        FormatError: with the three numbers.
    """
    if not accumulator_fits(reduction, w_bits, a_bits):
        n_w, n_x = (1 << w_bits) - 1, (1 << a_bits) - 1
        raise FormatError(
            f"{name}: {reduction} products of weights up to {n_w} and activations up to {n_x} sum to "
            f"{reduction * n_w * n_x}, the 32-bit accumulator ends below {1 << 31}; use fewer bits or split the layer",
            "accumulator",
        )


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"bits = {bits}; codes have 1 to {MAX_BITS} bits")


def _check_codes(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise FormatError(f"codes are {codes.dtype}; the format packs uint8 codes, encode the values first")
    if codes.dim() < 1:
        raise FormatError("codes are a scalar; expected [..., C]")
    if bits < MAX_BITS and codes.numel() and int(codes.max()) >= 1 << bits:
        raise FormatError(f"largest code is {int(codes.max())}; {bits} bits hold 0 to {(1 << bits) - 1}")
