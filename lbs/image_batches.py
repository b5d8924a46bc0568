"""The images that a network is quantized by: whatever holds them, as checked batches that are computed at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lbs.packing.pixels import Normalization
from lbs.quant.calibrate import images_of
from lbs_kernels.errors import DataError, ShapeError

_KEPT = 256  # images taken of a loader
_VALUES = 1 << 21  # of images computed at once: 13 images of 224 x 224

_log = logging.getLogger("lbs")


def ranks_of(model: nn.Module) -> tuple[int, ...]:
    """Dimensions that a batch may have: 4, or 3 where a network of lines [N, C, L] takes it."""
    return (3, 4) if any(isinstance(m, nn.Conv1d | nn.ConvTranspose1d) for m in model.modules()) else (4,)


def batches_of(images: Any, pixels: Normalization | None, device: torch.device, ranks: tuple[int, ...]) -> list[Tensor]:
    """Checked batches on the device, as the packed network is given them, small enough to be computed at once.

    Raises ShapeError, DataError.
    """
    found = list(_tensors(images))
    if not found:
        raise DataError("there are no images; give a tensor float32 [N, C, H, W], a list of batches or a loader")
    dtype = torch.float32 if pixels is None else torch.uint8
    first = found[0].shape[1:]
    for index, batch in enumerate(found):
        _check_batch(batch, index, dtype, ranks)
        if batch.shape[1:] != first:
            raise ShapeError(
                f"images of batch {index} are {list(batch.shape[1:])}, those of batch 0 {list(first)}; a packed "
                "network takes one size: resize or crop them to it"
            )
        bad = (~batch.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"images {bad[:5]} of batch {index} hold NaN or infinite values ({len(bad)} of {len(batch)} images); "
                "leave them out, or mend how they are read"
            )
    rows = max(1, _VALUES // max(first.numel(), 1))
    return [part.to(device) for batch in found for part in batch.split(rows) if len(part)]


def _check_batch(batch: Tensor, index: int, dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    if batch.dim() not in ranks:
        way = "images[None] makes one image a batch, torch.stack(images) several" if batch.dim() == 3 else "reshape it"
        raise ShapeError(f"batch {index} has shape {list(batch.shape)}; images are [N, C, H, W]: {way}")
    if not batch.numel():
        raise DataError(f"batch {index} of shape {list(batch.shape)} is empty; leave it out, or give images")
    if batch.dtype == dtype:
        return
    if dtype == torch.uint8:
        way = "give the bytes of images, or leave normalize= out and give normalised float32 images"
    elif batch.dtype == torch.uint8:
        way = "give normalize=(mean, std) of pixels scaled to 0..1, or normalise them: float32"
    else:
        way = "convert them with images.float()"
    raise ShapeError(f"images of batch {index} are {batch.dtype}, {dtype} is expected; {way}")


def _tensors(images: Any) -> Iterator[Tensor]:
    """The image tensor of every batch. A tuple is one batch, as loaders make them; a list holds batches."""
    if isinstance(images, Tensor | Mapping | tuple):
        images = [images]
    if not isinstance(images, Iterable):
        raise DataError(
            f"images are a {type(images).__name__}; give a tensor float32 [N, C, H, W], a list of batches or a loader"
        )
    count = 0
    for index, batch in enumerate(images):
        if count >= _KEPT and not isinstance(images, list):
            _log.info("the first %d images of the loader are used; give a list of batches to use more", count)
            return
        found = images_of(batch, index)
        yield found
        count += len(found) if found.dim() else 0
