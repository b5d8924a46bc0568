"""TensorLoader: shuffled, augmented, normalised batches of an image tensor, reproducible and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lbs.data.image_data import ImageData, fingerprint
from lbs.data.position import Position, check_parts
from lbs_kernels.errors import DataError

CROP_PADDING = 4


class Loader(Protocol):
    """What training asks of a loader: batches (float32 [n, C, H, W], int64 [n]), and to go on where it was."""

    classes: int  # one more than the largest label

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in channels_last memory: (x / 255 - mean) / std, in float32.

    The same three roundings as torchvision's ToTensor and Normalize, so weights trained with those see equal inputs.
    """
    pixels = images.to(torch.float32).div_(255)
    pixels.sub_(torch.as_tensor(mean, dtype=pixels.dtype, device=images.device)).div_(
        torch.as_tensor(std, dtype=pixels.dtype, device=images.device)
    )
    return pixels.permute(0, 3, 1, 2)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int = CROP_PADDING) -> Tensor:
    """Pad uint8 [N, H, W, C] by black pixels, cut a window of the old size, mirror it where asked.

    offsets: int64 [N, 2] in 0..2*padding, row and column of the window in the padded image (`padding` = no shift).
    flips: bool [N], left to right. One gather for the whole batch.
    """
    count, height, width, _ = images.shape
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[:, 1:]
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    index = torch.arange(count, device=images.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


class TensorLoader(Position):
    """Iterates batches (float32 [n, C, H, W], int64 [n]); one `for` loop is one epoch.

    What an epoch draws depends on (seed, epoch) only, not on what ran before; see `Position` for going on after a stop.

    Args:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        mean, std: one value per channel, of pixels scaled to 0..1.
        batch_size: at least 1; the last batch may be smaller unless `drop_last`.
        shuffle: draw a new order each epoch.
        augment: crop with `padding` black pixels around (added before normalisation), and flip horizontally.
        seed: with the epoch's number, decides order and augmentation.
        device: where the batches are made; the images are moved there once.
        rank, world_size: this process among those that train together. Each makes its own part of every batch;
            `batch_size` counts all parts, so the batches are the same for any number of processes.

    Raises DataError for sizes that do not fit, TrainingError for a state of another loader.

    Example:
        >>> import torch
        >>> images, labels = torch.zeros(5, 8, 8, 1, dtype=torch.uint8), torch.arange(5)
        >>> loader = TensorLoader(images, labels, mean=(0.5,), std=(0.5,), batch_size=2)
        >>> [tuple(x.shape) for x, y in loader]
        [(2, 1, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8)]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        padding: int = CROP_PADDING,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(f"images are {images.dtype} {tuple(images.shape)}; a loader needs uint8 [N, H, W, C]")
        if len(images) == 0 or len(labels) != len(images):
            raise DataError(
                f"{len(images)} images and {len(labels)} labels; a loader needs at least one, each labelled"
            )
        if not len(mean) == len(std) == images.shape[3]:
            raise DataError(f"mean has {len(mean)} and std {len(std)} values for images of {images.shape[3]} channels")
        if padding < 0:
            raise DataError(f"padding is {padding}; it must be 0 or more black pixels")
        check_parts(len(images), batch_size, drop_last, shuffle, rank, world_size)
        self.images = images.to(device) if device is not None else images
        self.labels = labels.to(self.images.device)
        self.classes = int(labels.max()) + 1
        self.rank, self.world_size = rank, world_size
        self.mean, self.std = (
            torch.tensor(tuple(x), dtype=torch.float32, device=self.images.device) for x in (mean, std)
        )
        self._fingerprint = ""
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.seed, self.drop_last, self.padding = seed, drop_last, padding

    def count(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, offsets, flips = self._draw(self.epoch)
        for index in self.positions():
            rows = order[self.rows(index)]
            images = self.images[rows]
            if self.augment:
                images = crop_and_flip(images, offsets[rows], flips[rows], self.padding)
            if len(rows):  # the last test batch may have nothing for some process
                yield normalize(images, self.mean, self.std), self.labels[rows]

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Order [N], and by image crop offsets [N, 2] and flips [N]; drawn on the CPU, so equal on any device."""
        count, device = len(self.images), self.images.device
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        offsets = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator, dtype=torch.float32) < 0.5
        return order.to(device), offsets.to(device), flips.to(device)

    def identity(self) -> dict[str, Any]:
        self._fingerprint = self._fingerprint or fingerprint(self.images, self.labels)
        return {
            "seed": self.seed,
            "images": len(self.images),
            "data": self._fingerprint,
            "processes": self.world_size,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "augment": self.augment,
            "padding": self.padding,
            "drop_last": self.drop_last,
        }


class Streamed(Protocol):
    """An image set that is not in memory and makes its own loaders."""

    def train_loader(self, batch_size: int, **options: Any) -> Any: ...

    def test_loader(self, batch_size: int, **options: Any) -> Any: ...

    def pixels_at(self, places: Tensor) -> tuple[Tensor, Tensor]: ...


def train_loader(
    data: ImageData | Streamed,
    batch_size: int = 128,
    *,
    augment: bool = True,
    seed: int = 0,
    drop_last: bool = True,
    **options: Any,
) -> Any:
    """Shuffled and, unless switched off, augmented batches of the training images; see TensorLoader."""
    options = {"augment": augment, "seed": seed, "drop_last": drop_last, **options}
    if not isinstance(data, ImageData):
        return data.train_loader(batch_size, **options)
    return TensorLoader(
        data.train_x, data.train_y, mean=data.mean, std=data.std, batch_size=batch_size, shuffle=True, **options
    )


def eval_loader(data: ImageData | Streamed, batch_size: int = 256, **options: Any) -> Any:
    """All test images in their order, not augmented; see TensorLoader."""
    if not isinstance(data, ImageData):
        return data.test_loader(batch_size, **options)
    return TensorLoader(data.test_x, data.test_y, mean=data.mean, std=data.std, batch_size=batch_size, **options)


def pixels_at(data: ImageData | Streamed, places: Tensor) -> tuple[Tensor, Tensor]:
    """Test images by their place in the set, uint8 [n, H, W, C], and labels int64 [n]; unreadable ones are left out."""
    if not isinstance(data, ImageData):
        return data.pixels_at(places)
    return data.test_x[places], data.test_y[places]
