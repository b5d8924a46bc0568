"""Image sets from folders: <root>/train/<class>/*.png and <root>/test/<class>/*.png."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lbs.data.decode import check_bytes, pillow
from lbs.data.image_data import ImageData, from_arrays
from lbs_kernels.errors import DataError
from lbs_kernels.files import open_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def from_folder(
    path: str | Path,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_unreadable: float = 0.0,
) -> ImageData:
    """Read <path>/train/<class>/* and <path>/test/<class>/* (or val instead of test); classes in name order.

    channels: 3 reads colour, 1 grey. All images must have one size. Statistics are measured on the training images
    unless given. max_unreadable: share of the files of a part that may be left out, with a warning each, because they
    cannot be read; `unreadable` of the result has each with its reason. Raises DataError for missing folders, more
    unreadable images than that, and sizes that differ.
    """
    root = Path(path)
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}; images are read with 3 (colour) or 1 (grey)")
    classes, folders = class_folders(root)
    arrays: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for part, folder in folders.items():
        arrays[f"{part}_x"], arrays[f"{part}_y"], unreadable = _read_part(folder, classes, channels, max_unreadable)
        left_out |= unreadable
    return replace(from_arrays(root.name, arrays, classes=classes, mean=mean, std=std), unreadable=left_out)


def class_folders(root: Path) -> tuple[list[str], dict[str, Path]]:
    """Names of the classes, and the folders of the parts `train` and `test`. Raises DataError."""
    if not (root / "train").is_dir():
        raise DataError(f"no folder {root / 'train'}; images are expected at {root}/train/<class>/*.png")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise DataError(f"{root} has a train folder but no test or val folder; both are needed")
    classes = _class_names(root / "train")
    if _class_names(test) != classes:
        odd = sorted(set(classes) ^ set(_class_names(test)))
        raise DataError(f"{root}: the classes {', '.join(odd[:5])} are in only one of train and {test.name}")
    return classes, {"train": root / "train", "test": test}


def image_files(folder: Path) -> list[Path]:
    """Images of one class, in name order. Raises DataError where there is none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no images; {', '.join(SUFFIXES)} are read")
    return files


def too_many_unreadable(found: Mapping[str, str], files: int, share: float) -> None:
    """Raise DataError where more than `share` of `files` cannot be read; `found`: file -> reason."""
    if len(found) > share * files:
        listed = "; ".join(list(found.values())[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise DataError(
            f"{len(found)} of {files} images cannot be read, at most {share:.2%} may be left out: {listed}{more}"
        )


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise DataError(f"{folder} has no class folders; images are expected at {folder}/<class>/*.png")
    return names


def _read_part(
    folder: Path, classes: list[str], channels: int, max_unreadable: float
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Images [N, H, W, C], labels [N], and the files that cannot be read -> why."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    unreadable: dict[str, str] = {}
    named = [(file, label) for label, name in enumerate(classes) for file in image_files(folder / name)]
    for file, label in named:
        try:
            image = _read_image(file, channels)
        except DataError as error:
            unreadable[str(file)] = str(error)
            continue
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{file} is {image.shape[1]}x{image.shape[0]} but the images before it are "
                f"{images[0].shape[1]}x{images[0].shape[0]}; resize them to one size, or stream them: imagenet:PATH"
            )
        images.append(image)
        labels.append(label)
    too_many_unreadable(unreadable, len(named), max_unreadable if images else 0.0)
    for reason in unreadable.values():
        warnings.warn(f"left out: {reason}", stacklevel=2)
    return np.stack(images), np.array(labels, dtype=np.int64), unreadable


def _read_image(file: Path, channels: int) -> np.ndarray:
    pil = pillow()
    try:
        with open_regular(file) as opened, pil.open(opened) as image:
            check_bytes(image)
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    # PIL reports damaged PNGs as SyntaxError and oversized ones as DecompressionBombError.
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image ({error}); repair or remove it") from error
    return pixels.reshape(*pixels.shape[:2], channels)
