"""Images that `lbs bench` looks at: the test images of a labelled set, or pictures of any folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import lbs.data
from lbs.data.pictures import read_pictures
from lbs.packing.model import PackedModel
from lbs_kernels.errors import DataError

CALIBRATION = 256  # images that set the ranges of 8 bits of the others
COUNT = 500  # images that every contender is asked for


@dataclass(frozen=True)
class BenchImages:
    """As `lbs.bench` takes them, each [N, C, H, W]; told: what they are."""

    images: Tensor
    labels: Tensor | None
    calibration: Tensor
    told: str

    def options(self) -> dict[str, Any]:
        """Arguments of `lbs.bench`."""
        return {"images": self.images, "labels": self.labels, "calibration": self.calibration}


def of_data(data: lbs.data.ImageSet, packed: PackedModel, count: int = COUNT) -> BenchImages:
    """`count` test images spread over the set, and training images that are not augmented.

    Raises:
        DataError: images of another shape than the network was packed for, or a count below 1.
    """
    if count < 1:
        raise DataError(f"{count} images; at least 1 is needed")
    if data.image_shape != packed.input_shape:
        raise DataError(f"images of {data.name} are {data.image_shape}, the network is for {packed.input_shape}")
    mean, std = (data.mean, data.std) if packed.normalize is None else (packed.normalize.mean, packed.normalize.std)
    data = replace(data, mean=tuple(mean), std=tuple(std))
    some = min(count, data.test_count)
    pixels, labels = lbs.data.pixels_at(data, torch.arange(some) * data.test_count // some)
    size = min(CALIBRATION, data.train_count)
    ranges, _ = next(iter(lbs.data.train_loader(data, size, augment=False)))
    return BenchImages(served(pixels, packed, data.mean, data.std), labels, ranges, f"{len(labels)} of {data.name}")


def of_folder(
    folder: str, packed: PackedModel, mean: tuple[float, ...], std: tuple[float, ...], count: int = COUNT
) -> BenchImages:
    """Pictures of a folder, without labels: they set ranges too, and the classes of float are what is compared with.

    Raises:
        DataError: nothing readable, or a network that takes no images.
    """
    channels, height, width = sizes_of(packed)
    pictures, unread = read_pictures(folder, count, channels, height if height == width else None)
    images = served(pictures.permute(0, 2, 3, 1), packed, mean, std)
    left_out = f", {len(unread)} more cannot be read" if unread else ""
    ranges = packed.float_images(images[:CALIBRATION]).float()
    return BenchImages(images, None, ranges, f"{len(images)} of {folder}{left_out}")


def sizes_of(packed: PackedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images of a network. Raises DataError where it takes lines or rows."""
    if len(packed.input_shape) != 3:
        wanted = ", ".join(map(str, packed.input_shape))
        raise DataError(
            f"{packed.name or 'the packed network'} takes [N, {wanted}], pictures are [N, C, H, W]; call it in Python "
            "(lbs.load) with what it was trained on"
        )
    channels, height, width = packed.input_shape
    return channels, height, width


def served(pixels: Tensor, packed: PackedModel, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, C] as the network takes them. Raises DataError without statistics for each channel."""
    channels = packed.input_shape[0]
    if packed.normalize is None and not len(mean) == len(std) == channels:
        raise DataError(
            f"{len(mean)} means and {len(std)} deviations for images of {channels} channels; give mean= and std=, one "
            "value of each per channel"
        )
    return lbs.data.normalize(pixels, mean, std) if packed.normalize is None else pixels.permute(0, 3, 1, 2)
