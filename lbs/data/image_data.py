"""ImageData: a labelled image set in memory, as bytes, with the statistics its networks normalise by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lbs_kernels.errors import DataError

MAX_CLASSES = 1 << 16  # guessed from the labels; ImageNet-21k has 21,841


@dataclass(frozen=True)
class ImageData:
    """Training and test images of one size. Pixels stay bytes until a loader normalises a batch.

    Raises DataError where shapes, dtypes, label range or statistics do not fit together.
    """

    name: str
    train_x: Tensor  # uint8 [N, H, W, C]
    train_y: Tensor  # int64 [N]
    test_x: Tensor  # uint8 [N, H, W, C]
    test_y: Tensor  # int64 [N]
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    classes: tuple[str, ...]
    unreadable: dict[str, str] = field(default_factory=dict)  # files that were left out -> why

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            _check_images(f"{self.name}: {part}", x)
            _check_labels(f"{self.name}: {part}", y, len(x), len(self.classes))
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: training images are {tuple(self.train_x.shape[1:])} and test images "
                f"{tuple(self.test_x.shape[1:])}; both must have one size [H, W, C]"
            )
        if not len(self.mean) == len(self.std) == self.channels:
            raise DataError(
                f"{self.name}: mean {self.mean} and std {self.std} need one value for each of the "
                f"{self.channels} channels"
            )
        if min(self.std) <= 0:
            raise DataError(f"{self.name}: std is {self.std}; every value must be above 0")

    @property
    def channels(self) -> int:
        return self.train_x.shape[3]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), the shape of one image as a network reads it."""
        height, width, channels = self.train_x.shape[1:]
        return channels, height, width

    @property
    def train_count(self) -> int:
        return len(self.train_x)

    @property
    def test_count(self) -> int:
        return len(self.test_x)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all images and labels: runs go on with the data they began with."""
        return fingerprint(self.train_x, self.train_y, self.test_x, self.test_y)

    def subset(self, count: int, seed: int) -> ImageData:
        """The same set with `count` training images, drawn by `seed`. Raises DataError where there are not so many."""
        if not 0 < count <= len(self.train_x):
            raise DataError(f"{count} of {len(self.train_x)} training images are asked for; ask for at most all")
        rows = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self, train_x=self.train_x[rows], train_y=self.train_y[rows])


def fingerprint(*tensors: Tensor) -> str:
    """sha256 over shapes and bytes, first 16 hex digits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.cpu().contiguous().numpy().data)
    return total.hexdigest()[:16]


def _check_images(what: str, x: Tensor) -> None:
    if x.dtype != torch.uint8 or x.dim() != 4:
        raise DataError(f"{what} images are {x.dtype} {tuple(x.shape)}; they must be uint8 [N, H, W, C]")
    if x.shape[3] not in (1, 3):
        raise DataError(f"{what} images are {tuple(x.shape)}; the last dimension, the channels, must be 1 or 3")
    if x.numel() == 0:
        raise DataError(f"{what} images are {tuple(x.shape)}; the set must not be empty")


def _check_labels(what: str, y: Tensor, images: int, classes: int) -> None:
    if y.dtype != torch.int64 or y.dim() != 1 or len(y) != images:
        raise DataError(f"{what} labels are {y.dtype} {tuple(y.shape)} for {images} images; they must be int64 [N]")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{what} labels go from {low} to {high}; of {classes} classes they must lie in 0..{classes - 1}"
        )


def from_arrays(
    name: str,
    arrays: dict[str, np.ndarray],
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageData:
    """Build ImageData from numpy arrays train_x, train_y, test_x, test_y.

    Missing class names become "0", "1", ...; missing statistics are measured on the training images.
    """
    for key, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise DataError(f"{name}: {key} holds {array.dtype}; images and labels must be integers")
    for key in ("train_x", "test_x"):
        if arrays[key].dtype != np.uint8:
            raise DataError(f"{name}: {key} holds {arrays[key].dtype}; images must be uint8 [N, H, W, C]")
    images = {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in ("train_x", "test_x")}
    labels = {key: arrays[key].astype(np.int64) for key in ("train_y", "test_y")}
    _check_images(f"{name}: train", images["train_x"])
    if classes is None:
        highest = max(int(arrays[key].max()) if arrays[key].size else -1 for key in labels)
        if highest >= MAX_CLASSES:
            raise DataError(
                f"{name}: the highest label is {highest}; without class names at most {MAX_CLASSES} are taken"
            )
        classes = [str(i) for i in range(1 + highest)]
    measured = measure_statistics(images["train_x"]) if mean is None or std is None else (mean, std)
    return ImageData(
        name=name,
        train_x=images["train_x"],
        train_y=torch.from_numpy(labels["train_y"]),
        test_x=images["test_x"],
        test_y=torch.from_numpy(labels["test_y"]),
        mean=tuple(measured[0] if mean is None else mean),
        std=tuple(measured[1] if std is None else std),
        classes=tuple(classes),
    )


def measure_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [N, H, W, C] scaled to 0..1, to four digits.

    Counts the 256 values of each channel, so the result does not depend on the order of a float sum. A constant
    channel gets the standard deviation 1, which leaves it at zero after normalisation.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[3]):
        counts = torch.bincount(images[..., channel].reshape(-1).int(), minlength=256).double()
        average = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - average) ** 2).sum() / counts.sum())
        mean.append(round(average, 4))
        std.append(round(variance**0.5, 4) or 1.0)
    return tuple(mean), tuple(std)
