"""Image sets that need no files: scikit-learn's digits and synthetic images."""

from __future__ import annotations

import numpy as np

from lbs.data.image_data import ImageData, from_arrays
from lbs.extras import asked_for
from lbs_kernels.errors import DataError

_DIGITS_TEST = 360


def digits(seed: int = 0) -> ImageData:
    """1,797 real 8x8 grey digits that ship inside scikit-learn: 1,437 for training, 360 for testing.

    The split is random but fixed by `seed`, since the file is ordered by writer. Pixels 0..16 become 0..255.
    """
    with asked_for("the data set digits"):
        from sklearn.datasets import load_digits  # half a second to import, needed by this data set only

    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    arrays = {
        "train_x": images[train],
        "train_y": source.target[train],
        "test_x": images[test],
        "test_y": source.target[test],
    }
    return from_arrays("digits", arrays, classes=[str(i) for i in range(10)])


def synthetic(
    classes: int = 10, train: int = 512, test: int = 128, size: int = 32, channels: int = 3, seed: int = 0
) -> ImageData:
    """Noise around one coarse random pattern per class: learnable, reproducible, and of any size."""
    if min(classes, train, test, size) < 1:
        raise DataError(f"synthetic data of {classes} classes, {train}+{test} images, size {size}; each must be >= 1")
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (classes, -(-size // 4), -(-size // 4), channels))
    patterns = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :size, :size]
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", train), ("test", test)):
        labels = rng.integers(0, classes, count)
        noise = rng.normal(0, 40, (count, size, size, channels))
        arrays[f"{part}_x"] = np.clip(np.rint(patterns[labels] + noise), 0, 255).astype(np.uint8)
        arrays[f"{part}_y"] = labels
    return from_arrays("synthetic", arrays, classes=[str(i) for i in range(classes)])
