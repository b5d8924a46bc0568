"""Image sets in memory and the loader that batches them.

>>> import lbs.data
>>> data = lbs.data.load("digits")
>>> data.image_shape, len(data.train_x), len(data.test_x)
((1, 8, 8), 1437, 360)
>>> images, labels = next(iter(lbs.data.train_loader(data, batch_size=16)))
>>> images.shape
torch.Size([16, 1, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from lbs.data.builtin import digits, synthetic
from lbs.data.cifar100 import cifar100, is_python_layout
from lbs.data.folder import from_folder
from lbs.data.image_data import ImageData, from_arrays
from lbs.data.loader import Loader, TensorLoader, crop_and_flip, eval_loader, normalize, pixels_at, train_loader
from lbs.data.npz import from_npz
from lbs.data.stream import FolderData, FolderLoader, stream_folder
from lbs_kernels.errors import DataError

_BUILTIN: dict[str, Callable[[], ImageData]] = {"digits": digits, "synthetic": synthetic}


ImageSet: TypeAlias = ImageData | FolderData
_STREAMED = "imagenet:"


def load(source: str | Path, max_unreadable: float = 0.0) -> ImageSet:
    """An image set by name ("digits", "synthetic") or path: a .npz file, a folder that is or holds
    `cifar-100-python`, or a folder with train/<class>/*.png and test/<class>/*.png, which is read into memory (or with
    images and a labels.txt in train and test, lines of a path and a class).
    `imagenet:PATH` is such a folder (val instead of test) with images of any size, read while training: crops of 224.

    max_unreadable: share of a folder's files that may be left out because they cannot be read.

    Raises DataError where nothing readable is found.
    """
    if str(source) in _BUILTIN:
        return _BUILTIN[str(source)]()
    if str(source).startswith(_STREAMED):
        return stream_folder(str(source).removeprefix(_STREAMED), max_unreadable=max_unreadable)
    path = Path(source)
    if not path.exists():
        raise DataError(f"no data set at {path}; give a path that exists, or one of {', '.join(_BUILTIN)}")
    if path.is_file():
        return from_npz(path)
    return cifar100(path) if is_python_layout(path) else from_folder(path, max_unreadable=max_unreadable)


__all__ = [
    "FolderData",
    "FolderLoader",
    "ImageData",
    "ImageSet",
    "Loader",
    "TensorLoader",
    "cifar100",
    "crop_and_flip",
    "digits",
    "eval_loader",
    "from_arrays",
    "from_folder",
    "from_npz",
    "load",
    "normalize",
    "pixels_at",
    "stream_folder",
    "synthetic",
    "train_loader",
]
