"""Codes, planes and images on a GPU through `lbs_kernels._cuda`, on torch's current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.extension import require_cuda
from lbs_kernels.program.planes import words
from lbs_kernels.program.steps import Consumer


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit-planes int32 [..., bits, CW] of codes uint8 [..., C] below 2^bits, as `format.pack_planes`.

    Raises:
        ShapeError: not contiguous uint8 on a GPU. BackendError: the CUDA module is missing.
    """
    _check(codes, torch.uint8, 1)
    channels = codes.shape[-1]
    planes = torch.empty((*codes.shape[:-1], bits, words(channels)), dtype=torch.int32, device=codes.device)
    rows = codes.numel() // max(1, channels)
    require_cuda().pack_planes(codes.data_ptr(), planes.data_ptr(), rows, channels, bits, *_where(codes))
    return planes


def unpack_planes(planes: Tensor, bits: int, channels: int) -> Tensor:
    """Codes uint8 [..., C] of planes int32 [..., bits, CW]; unused bits are not looked at.

    Raises:
        ShapeError: not contiguous int32 on a GPU. FormatError: planes of another shape. BackendError: no CUDA module.
    """
    _check(planes, torch.int32, 2)
    if tuple(planes.shape[-2:]) != (bits, words(channels)):
        raise FormatError(
            f"planes have shape {tuple(planes.shape)}; {bits}-bit codes of {channels} channels need "
            f"[..., {bits}, {words(channels)}]"
        )
    codes = torch.empty((*planes.shape[:-2], channels), dtype=torch.uint8, device=planes.device)
    rows = codes.numel() // max(1, channels)
    require_cuda().unpack_planes(planes.data_ptr(), codes.data_ptr(), rows, channels, bits, *_where(planes))
    return codes


def encode_image(x: Tensor, consumer: Consumer) -> Tensor:
    """Codes uint8 [N, H, W, C] of an image float32 [N, C, H, W], as `epilogue.encode_reference`; no norm, no ReLU.

    Raises:
        ShapeError: not a contiguous float32 image on a GPU. BackendError: the CUDA module is missing.
    """
    _check(x, torch.float32, 4)
    batch, channels, height, width = x.shape
    codes = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=x.device)
    require_cuda().encode_image(
        x.data_ptr(),
        codes.data_ptr(),
        batch,
        channels,
        height * width,
        consumer.bits,
        consumer.scale,
        consumer.zero,
        consumer.signed,
        *_where(x),
    )
    return codes


def _check(x: Tensor, dtype: torch.dtype, dimensions: int) -> None:
    if x.dtype is not dtype or x.dim() < dimensions or not x.is_cuda or not x.is_contiguous():
        raise ShapeError(
            f"tensor is {x.dtype} {list(x.shape)} on {x.device}; the CUDA kernel takes contiguous {dtype} on a GPU, "
            f"{dimensions} dimensions or more"
        )


def _where(x: Tensor) -> tuple[int, int]:
    """Device index and the handle of its current stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
