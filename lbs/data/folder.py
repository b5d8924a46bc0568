"""Image sets from folders: <root>/train/<class>/*.png and <root>/test/<class>/*.png, or images with a list of labels.

A part (train; test or val) that holds a `labels.txt` or `labels.csv` has its images in any folders of it, and in that
file one line for each: its path below the part, a comma or blanks, and its class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lbs.data.decode import check_bytes, pillow
from lbs.data.image_data import MAX_CLASSES, ImageData, from_arrays
from lbs_kernels.errors import DataError
from lbs_kernels.files import open_regular, read_regular

LABELS = ("labels.txt", "labels.csv")  # of a part without class folders
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def from_folder(
    path: str | Path,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_unreadable: float = 0.0,
) -> ImageData:
    """Read <path>/train/<class>/* and <path>/test/<class>/* (or val instead of test), or as a list of labels says;
    classes in name order, those that are whole numbers by number.

    channels: 3 reads colour, 1 grey. All images must have one size. Statistics are measured on the training images
    unless given. max_unreadable: share of the files of a part that may be left out, with a warning each, because they
    cannot be read; `unreadable` of the result has each with its reason. Raises DataError for missing folders, more
    unreadable images than that, and sizes that differ.
    """
    root = Path(path)
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}; images are read with 3 (colour) or 1 (grey)")
    classes, parts = labelled_files(root)
    arrays: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for part, named in parts.items():
        arrays[f"{part}_x"], arrays[f"{part}_y"], unreadable = _read_part(named, channels, max_unreadable)
        left_out |= unreadable
    return replace(from_arrays(root.name, arrays, classes=classes, mean=mean, std=std), unreadable=left_out)


def labelled_files(root: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Names of the classes, and the images of the parts `train` and `test` with the numbers of their classes, in order
    of class and name.

    Raises:
        DataError: a part that is missing or holds no images, classes that are in one part alone, a list of labels that
            does not fit the images.
    """
    if not (root / "train").is_dir():
        raise DataError(
            f"no folder {root / 'train'}; images are expected at {root}/train/<class>/*.png, or at {root}/train with "
            f"their classes in {root}/train/{LABELS[0]}"
        )
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise DataError(f"{root} has a train folder but no test or val folder; both are needed")
    listed = {"train": _listed(root / "train"), "test": _listed(test)}
    names = set(listed["train"]) | set(listed["test"])
    odd = sorted(set(listed["train"]) ^ set(listed["test"]))
    if _map_of(root / "train") is not None and all(name.isdecimal() for name in names):
        index = {name: int(name) for name in names}
        if max(index.values()) >= MAX_CLASSES:
            raise DataError(
                f"{root}: class {max(index.values())} is listed; numbers of classes are below {MAX_CLASSES}"
            )
        classes = [str(number) for number in range(max(index.values()) + 1)]
    elif odd:
        raise DataError(f"{root}: the classes {', '.join(odd[:5])} are in only one of train and {test.name}")
    else:
        classes = sorted(names)
        index = {name: label for label, name in enumerate(classes)}
    parts = {}
    for part, files in listed.items():
        for name in [name for name, found in files.items() if not found]:
            raise DataError(f"{root / part}: class {name} holds no images; {', '.join(SUFFIXES)} are read")
        named = sorted((index[name], file) for name, found in files.items() for file in found)
        parts[part] = [(file, label) for label, file in named]
    return classes, parts


def _map_of(folder: Path) -> Path | None:
    """The list of labels of a part, where it has one."""
    return next((folder / name for name in LABELS if (folder / name).is_file()), None)


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Images of one part by the names of their classes."""
    labels = _map_of(folder)
    if labels is not None:
        return _mapped(folder, labels)
    return {
        name: [file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES]
        for name in _class_names(folder)
    }


def _mapped(folder: Path, labels: Path) -> dict[str, list[Path]]:
    """As a list of labels says, which names every image once."""
    try:
        lines = read_regular(labels).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{labels} cannot be read ({error}); it holds lines such as `a.png cat`") from error
    found: dict[Path, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = (
            part.strip() for part in (line.partition(",") if "," in line else line.strip().rpartition(" "))
        )
        file = folder / name
        if not name or not label or ".." in Path(name).parts or Path(name).is_absolute():
            raise DataError(f"{labels}, line {number}: {line!r} is no path below {folder} and a class, as `a.png cat`")
        if file in found:
            raise DataError(f"{labels}, line {number}: {name} is listed a second time; name each image once")
        found[file] = label
    here = {file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES}
    for odd, what in (
        (found.keys() - here, "is listed in {} and no image there"),
        (here - found.keys(), "is not listed in {}"),
    ):
        if odd:
            more = f", as {len(odd) - 1} more" if len(odd) > 1 else ""
            raise DataError(f"{min(odd)} {what.format(labels.name)}{more}; list every image of {folder} once")
    if not found:
        raise DataError(f"{labels} lists no images; it holds lines such as `a.png cat`")
    classes: dict[str, list[Path]] = {}
    for file, label in found.items():
        classes.setdefault(label, []).append(file)
    return classes


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
        raise DataError(
            f"{folder} has no class folders; images are expected at {folder}/<class>/*.png, or with their classes in "
            f"{folder}/{LABELS[0]}, a line `a.png cat` for each"
        )
    return names


def _read_part(
    named: list[tuple[Path, int]], channels: int, max_unreadable: float
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Images [N, H, W, C], labels [N], and the files that cannot be read -> why."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    unreadable: dict[str, str] = {}
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
