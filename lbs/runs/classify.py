"""A folder of images of any size, classified by one process or by several that torchrun started: one row per image."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lbs.data.pictures import picture_files, read_picture
from lbs.packing.model import PackedModel
from lbs.run_folder import check_place, write_bytes
from lbs.runs.bench_images import served, sizes_of
from lbs.train import distributed
from lbs.train.protocols import Progress
from lbs_kernels.errors import DataError, LbsError

COLUMNS = ("image", "class", "name", "probability", "error")


@dataclass(frozen=True)
class Row:
    """An image by its path below the folder: its class and the softmax of it, or why there is none."""

    image: str
    place: int | None
    probability: float
    error: str = ""

    def cells(self, names: Sequence[str]) -> tuple[str, ...]:
        """As COLUMNS."""
        if self.place is None:
            return self.image, "", "", "", self.error
        name = names[self.place] if names else ""
        return self.image, str(self.place), name, f"{self.probability:.6f}", ""


def classify_folder(
    packed: PackedModel,
    folder: str | Path,
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    batch: int = 64,
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of all images of a folder and the folders in it, by path, each once; on every process the same.

    Every process classifies its share. Where a network is packed whole, a row does not depend on which images share a
    call, nor on the number of processes.

    Args:
        mean, std: pixel statistics per channel, of a network that takes floats. batch: images per call.

    Raises:
        DataError: no folder, no image in it that can be read, or a network that takes no images. LbsError: one that
            returns no logits.
    """
    if batch < 1:
        raise DataError(f"batch is {batch}; a call takes at least 1 image")
    root = Path(folder)
    files = distributed.first(lambda: picture_files(root))  # one list for all, whatever is added meanwhile
    share = files[distributed.rank() :: distributed.world_size()]
    if progress is not None:
        progress.begin("classify", len(share), 0)
    own: list[Row] = []
    with ThreadPoolExecutor(1) as ahead:  # decodes a batch while the one before it is computed
        for rows in _computed(packed, root, share, mean, std, batch, ahead):
            own += rows
            if progress is not None:
                progress.advance(len(rows))
    if progress is not None:
        progress.end()
    with distributed.answered():
        shares = distributed.gather(own)
    rows = [shares[place % len(shares)][place // len(shares)] for place in range(len(files))]
    if all(row.place is None for row in rows):
        raise DataError(f"no image of {root} can be read: {'; '.join(row.error for row in rows[:3])}")
    return rows


def _computed(
    packed: PackedModel,
    root: Path,
    files: list[Path],
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    ahead: ThreadPoolExecutor,
) -> Iterator[list[Row]]:
    channels, height, width = sizes_of(packed)
    parts = [files[start : start + batch] for start in range(0, len(files), batch)]

    def decoded(part: list[Path]) -> list[np.ndarray | str]:
        return [_decoded(file, channels, height, width) for file in part]

    coming = ahead.submit(decoded, parts[0]) if parts else None
    for number, part in enumerate(parts):
        assert coming is not None
        found = coming.result()
        coming = ahead.submit(decoded, parts[number + 1]) if number + 1 < len(parts) else None
        good = [pixels for pixels in found if not isinstance(pixels, str)]
        classes = iter(_classes(packed, served(torch.from_numpy(np.stack(good)), packed, mean, std)) if good else [])
        yield [
            Row(str(file.relative_to(root)), None, 0.0, pixels)
            if isinstance(pixels, str)
            else Row(str(file.relative_to(root)), *next(classes))
            for file, pixels in zip(part, found, strict=True)
        ]


def _decoded(file: Path, channels: int, height: int, width: int) -> np.ndarray | str:
    """uint8 [H, W, C], or why there is none."""
    try:
        pixels = read_picture(file, channels, height if height == width else None)
    except DataError as error:
        return str(error)
    if pixels.shape[:2] != (height, width):
        return f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, the network takes {width}x{height}"
    return pixels


@torch.inference_mode()
def _classes(packed: PackedModel, images: Tensor) -> list[tuple[int, float]]:
    logits = _logits(packed, images.to(packed.device))
    shares = logits.double().softmax(1)
    places = logits.argmax(1)
    return list(zip(places.tolist(), shares.gather(1, places[:, None])[:, 0].tolist(), strict=True))


def _logits(packed: PackedModel, images: Tensor) -> Tensor:
    logits = packed(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise LbsError(
            f"{packed.name or 'the packed network'} returns no logits [N, classes]; there is no class to tell"
        )
    return logits


def check_result(packed: PackedModel, path: str | Path, names: Sequence[str] = ()) -> None:
    """What `write_csv` would find after the last image, before the first.

    Raises:
        DataError: fewer names than classes. CheckpointError: a place that cannot be written. LbsError: no logits.
    """
    with torch.inference_mode():
        classes = _logits(packed, packed.random_images(1)).shape[1]
    if names and classes > len(names):
        raise DataError(f"{len(names)} names for {classes} classes; give a name for every class, from 0 on")
    distributed.first(lambda: check_place(Path(path)))


def write_csv(path: str | Path, rows: Sequence[Row], names: Sequence[str] = ()) -> None:
    """One line per row, whole or not at all; of several processes the first writes.

    Raises:
        CheckpointError: a full disk.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(row.cells(names) for row in rows)
    write_bytes(Path(path), text.getvalue().encode(errors="backslashreplace"))
