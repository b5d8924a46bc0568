"""Pictures of any folder, without classes: what calibration looks at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lbs.data.decode import central_crop, read_rgb
from lbs.data.folder import SUFFIXES
from lbs_kernels.errors import DataError

_WHOLE = 1 << 16  # no JPEG is larger: it is decoded at its own size


def read_pictures(
    folder: str | Path, count: int, channels: int = 3, size: int | None = None
) -> tuple[Tensor, dict[str, str]]:
    """`count` pictures of a folder and the folders in it, spread evenly over their names: (uint8 [N, C, H, W], unread).

    Arguments:
        channels: 3 reads colour, 1 grey. size: of their sides; other pictures are scaled, the short side to 8/7 of it,
            and cropped to their middle. None takes them as they are.

    Returns:
        Fewer pictures where there are fewer, or some cannot be read: unread has their paths, each with the reason.

    Raises:
        DataError: no folder, nothing readable in it, or pictures of several sizes and no `size`.
    """
    root = Path(folder)
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}; images are read with 3 (colour) or 1 (grey)")
    if count < 1 or (size is not None and size < 1):
        raise DataError(f"{count} images of size {size}; both are at least 1")
    files = picture_files(root)
    chosen = [files[index * len(files) // min(count, len(files))] for index in range(min(count, len(files)))]
    pictures: list[np.ndarray] = []
    unread: dict[str, str] = {}
    for file in chosen:
        try:
            picture = read_picture(file, channels, size)
        except DataError as error:
            unread[str(file)] = str(error)
            continue
        if pictures and picture.shape != pictures[0].shape:
            (here, wide, _), (high, across, _) = picture.shape, pictures[0].shape
            raise DataError(f"{file} is {wide}x{here}, those before it are {across}x{high}; give size=, such as 224")
        pictures.append(picture)
    if not pictures:
        raise DataError(f"no image of {root} can be read: {'; '.join(list(unread.values())[:3])}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), unread


def picture_files(folder: Path) -> list[Path]:
    """The images of a folder and the folders in it, by path. Raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give one that holds images, in it or in folders of it")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"no image of {folder} can be read: it holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def read_picture(file: Path, channels: int, size: int | None) -> np.ndarray:
    """uint8 [H, W, C], cropped to `size` as `read_pictures` does. Raises DataError."""
    image = read_rgb(file, size or _WHOLE).convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(image) if size is None or image.size == (size, size) else central_crop(image, size)
    return pixels.reshape(*pixels.shape[:2], channels)
