"""Image sets from .npz files, never unpickling."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lbs.data.image_data import ImageData, from_arrays
from lbs_kernels.errors import DataError

# What numpy and zipfile say of damaged, encrypted and foreign archives.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError)
_DEFLATE = 1032  # the highest ratio deflate reaches
# A file of a few kilobytes may hold gigabytes of zeros. Photographs shrink to a half or a third, digits and drawings of
# lines to a tenth or a fiftieth. What is no larger than 256 MiB unpacked (CIFAR-100 takes 175) may hold anything.
FREE_BYTES = 256 << 20
LARGEST_RATIO = 64
KEYS = ("train_x", "train_y", "test_x", "test_y")


def from_npz(path: str | Path, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> ImageData:
    """Read uint8 images train_x, test_x [N, H, W, C] and integer labels train_y, test_y [N] from a .npz file.

    Statistics are measured on the training images unless given. Raises DataError for a missing or damaged file, a
    missing array, and shapes that do not fit.
    """
    arrays = read_npz(path)
    return from_arrays(Path(path).stem, arrays, mean=mean, std=std)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The four arrays of the file as they are stored. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}; give the path of a .npz file with the arrays {', '.join(KEYS)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds a single array; a .npz file with {', '.join(KEYS)} is needed")
            missing = [key for key in KEYS if key not in archive.files]
            if missing:
                raise DataError(f"{path} lacks the arrays {', '.join(missing)}; it holds {', '.join(archive.files)}")
            _check_claims(path)
            return {key: archive[key] for key in KEYS}
    except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable .npz file ({error}); write it again with numpy.savez") from error


def _check_claims(path: Path) -> None:
    """Refuse arrays that claim more bytes than the archive holds of them, before memory is asked for."""
    size = path.stat().st_size
    expanded = packed = 0
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        twins = [key for key in KEYS if {key, f"{key}.npy"} <= names]
        if twins:  # numpy would read these, whatever NAME.npy holds
            raise DataError(f"{path} holds an entry {twins[0]} beside {twins[0]}.npy; write it with numpy.savez")
        for entry in (archive.getinfo(f"{key}.npy") for key in KEYS):
            with archive.open(entry) as file:
                old = np.lib.format.read_magic(file) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                held = entry.file_size - file.tell()
            if dtype.hasobject:
                continue  # a pickle of any length, which numpy refuses unread
            expanded, packed = expanded + entry.file_size, packed + entry.compress_size
            claimed = math.prod(shape) * dtype.itemsize
            if claimed != held or entry.file_size > _DEFLATE * min(entry.compress_size, size):
                raise DataError(
                    f"{path}: {entry.filename} of shape {shape} claims {claimed} bytes, the archive holds {held} in "
                    f"{entry.compress_size}; it is damaged, write it again with numpy.savez"
                )
    if expands_too_far(expanded, min(packed, size)):
        raise DataError(
            f"{path}: {min(packed, size)} bytes expand to {expanded}; beyond {FREE_BYTES} bytes, images shrink to "
            f"1/{LARGEST_RATIO} at best; if these are images, write them with numpy.savez, which does not compress"
        )


def expands_too_far(expanded: int, packed: int) -> bool:
    """Whether so many bytes are more than images can be of which an archive holds `packed` bytes: it is made to fill
    the memory.

    >>> expands_too_far(1 << 30, 1 << 20), expands_too_far(1 << 30, 1 << 24)
    (True, False)
    """
    return expanded > FREE_BYTES + LARGEST_RATIO * packed
