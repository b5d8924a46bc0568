"""Image folders that stay on the disk: decoded batch by batch in worker threads, sharded, resumable in an epoch.

PIL decodes outside Python's global lock, so threads are enough, and nothing has to be pickled to other processes.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbs.data.decode import TEST_SCALE, Draw, central_crop, read_rgb, training_crop
from lbs.data.folder import labelled_files, too_many_unreadable
from lbs.data.loader import normalize
from lbs.data.position import Position, check_parts
from lbs_kernels.device import processors
from lbs_kernels.errors import DataError

IMAGENET_MEAN, IMAGENET_STD, IMAGENET_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224
_AHEAD = 3  # batches that are decoded while one is used


@dataclass(frozen=True)
class Listing:
    """Files and their classes, in order of class and name."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def fingerprint(self, root: Path) -> str:
        """Digest of the names below `root` and the sizes of the files; contents are not read."""
        total = hashlib.sha256()
        for file, label in zip(self.files, self.labels, strict=True):
            total.update(f"{file.relative_to(root)}:{label}:{file.stat().st_size}\n".encode())
        return total.hexdigest()[:16]


@dataclass(frozen=True)
class FolderData:
    """An ImageNet-style folder: root/train/<class>/* and root/val/<class>/* (or test)."""

    name: str
    root: Path
    train: Listing
    test: Listing
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: int = IMAGENET_SIZE
    max_unreadable: float = 0.0  # share of the files that may be unreadable
    fingerprint: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a crop."""
        return 3, self.size, self.size

    @property
    def train_count(self) -> int:
        return len(self.train.files)

    @property
    def test_count(self) -> int:
        return len(self.test.files)

    def subset(self, count: int, seed: int) -> FolderData:
        """The same set with `count` training images, drawn by `seed`. Raises DataError where there are not so many."""
        if not 0 < count <= self.train_count:
            raise DataError(f"{count} of {self.train_count} training images are asked for; ask for at most all")
        rows = torch.randperm(self.train_count, generator=torch.Generator().manual_seed(seed))[:count].tolist()
        train = Listing(tuple(self.train.files[i] for i in rows), tuple(self.train.labels[i] for i in rows))
        return replace(self, train=train)

    def train_loader(self, batch_size: int, **options: Any) -> FolderLoader:
        """Shuffled, augmented batches; see FolderLoader."""
        return FolderLoader(self, self.train, batch_size, **{"shuffle": True, "drop_last": True, **options})

    def test_loader(self, batch_size: int, **options: Any) -> FolderLoader:
        """The middle of every test image, in order."""
        return FolderLoader(self, self.test, batch_size, augment=False, **options)

    def pixels_at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The middle of some test images, uint8 [n, H, W, C], and their labels; unreadable ones are left out."""
        rows = places.tolist()
        listing = Listing(tuple(self.test.files[i] for i in rows), tuple(self.test.labels[i] for i in rows))
        loader = FolderLoader(self, listing, len(rows), augment=False, of=self.test_count)
        return loader.pixels()


def stream_folder(path: str | Path, size: int = IMAGENET_SIZE, max_unreadable: float = 0.0) -> FolderData:
    """List an ImageNet-style folder. Raises DataError for missing folders and classes that differ between parts."""
    root = Path(path)
    classes, found = labelled_files(root)
    parts = {}
    for part, named in found.items():
        parts[part] = Listing(tuple(file for file, _ in named), tuple(label for _, label in named))
    digest = hashlib.sha256("".join(listing.fingerprint(root) for listing in parts.values()).encode()).hexdigest()
    return FolderData(
        root.name,
        root,
        parts["train"],
        parts["test"],
        tuple(classes),
        size=size,
        max_unreadable=max_unreadable,
        fingerprint=digest[:16],
    )


class FolderLoader(Position):
    """Iterates batches (float32 [n, 3, size, size], int64 [n]) of a listing; see `Position` for going on after a stop.

    Order and crops depend on (seed, epoch) and the place in the order only: equal for any number of workers and
    processes. A training image that cannot be read is replaced by the next one of its batch, a test image is left out;
    `unreadable` has each with its reason. More of them than the data set's `max_unreadable` of all files end the loop
    with a DataError.

    Args:
        rank, world_size: as in TensorLoader. workers: threads that decode; by default one per processor.
            of: files that `max_unreadable` is a share of, where the listing is a part of them.
    """

    def __init__(
        self,
        data: FolderData,
        listing: Listing,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        of: int | None = None,
    ) -> None:
        check_parts(len(listing.files), batch_size, drop_last, shuffle, rank, world_size)
        self.data, self.listing = data, listing
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.seed, self.drop_last, self.rank, self.world_size = seed, drop_last, rank, world_size
        self.device = torch.device(device or "cpu")
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (data.mean, data.std))
        self.workers = workers or max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.classes = max(listing.labels) + 1
        self.unreadable: dict[str, str] = {}
        self.of = of or self.count()
        self._fingerprint = ""

    def count(self) -> int:
        return len(self.listing.files)

    def identity(self) -> dict[str, Any]:
        self._fingerprint = self._fingerprint or self.listing.fingerprint(self.data.root)
        return {
            "seed": self.seed,
            "images": self.count(),
            "data": self._fingerprint,
            "processes": self.world_size,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "augment": self.augment,
            "size": self.data.size,
            "drop_last": self.drop_last,
        }

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, draws = self._draw(self.epoch)
        ahead: deque[list[Future[np.ndarray | str]]] = deque()
        batches, asked = len(self), self._next_batch if self._resume else 0
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for index in self.positions():
                    while asked < batches and len(ahead) < _AHEAD:
                        rows = order[self.rows(asked)].tolist()
                        ahead.append([pool.submit(self._decode, row, draws[row]) for row in rows])
                        asked += 1
                    pixels, labels = self._collect(ahead.popleft(), order[self.rows(index)].tolist())
                    if len(labels):
                        yield normalize(pixels.to(self.device, non_blocking=True), self.mean, self.std), labels
            finally:  # a loop left early does not wait for batches nobody will see
                pool.shutdown(wait=False, cancel_futures=True)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """All images at once as they were decoded, and their labels; those that cannot be read are left out."""
        rows, (_, draws) = range(self.count()), self._draw(0)
        with ThreadPoolExecutor(self.workers) as pool:
            return self._collect([pool.submit(self._decode, row, draws[row]) for row in rows], list(rows))

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Order [N], and by image five numbers in 0..1 [N, 5]."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.count(), generator=generator) if self.shuffle else torch.arange(self.count())
        return order, torch.rand(self.count(), 5, generator=generator, dtype=torch.float32)

    def _decode(self, row: int, draw: Tensor) -> np.ndarray | str:
        """Pixels uint8 [size, size, 3], or why there are none."""
        size = self.data.size
        try:
            image = read_rgb(self.listing.files[row], size if self.augment else math.ceil(size * TEST_SCALE))
        except DataError as error:
            return str(error)
        return training_crop(image, size, Draw(*draw.tolist())) if self.augment else central_crop(image, size)

    def _collect(self, futures: list[Future[np.ndarray | str]], rows: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 [n, size, size, 3] and labels of the images that could be read, of all of them in training."""
        found = [future.result() for future in futures]
        for row, pixels in zip(rows, found, strict=True):
            if isinstance(pixels, str):
                self._note(self.listing.files[row], pixels)
        good = [place for place, pixels in enumerate(found) if not isinstance(pixels, str)]
        if rows and not good and self.shuffle:  # there is nothing to replace them by
            raise DataError(f"none of the {len(rows)} images of a batch can be read, the first is {found[0]}")
        if self.shuffle:
            good = [
                next(p for p in (*good, good[0] + len(rows)) if p >= place) % len(rows) for place in range(len(rows))
            ]
        pixels = (
            np.stack([found[place] for place in good])
            if good
            else np.zeros((0, self.data.size, self.data.size, 3), np.uint8)
        )
        labels = torch.tensor([self.listing.labels[rows[place]] for place in good], dtype=torch.int64)
        return torch.from_numpy(pixels), labels.to(self.device)

    def _note(self, file: Path, reason: str) -> None:
        if str(file) not in self.unreadable:
            self.unreadable[str(file)] = reason
            warnings.warn(f"left out: {reason}", stacklevel=2)
            too_many_unreadable(self.unreadable, self.of, self.data.max_unreadable)
