"""One image file -> uint8 [size, size, 3]: the crops ImageNet networks are trained and tested with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbs.extras import asked_for
from lbs_kernels import files
from lbs_kernels.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Share of the area and aspect ratio of a training crop; test images are scaled to 8/7 of the crop first (256 for 224).
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TEST_SCALE = 8 / 7
NARROWEST = 64  # the long side over the short one


@dataclass(frozen=True)
class Draw:
    """What chance decides about one training image, each in 0..1."""

    area: float
    ratio: float
    left: float
    top: float
    flip: float


def pillow() -> Any:
    """PIL.Image. Raises LbsError where pillow is not installed."""
    with asked_for("reading image files"):
        from PIL import Image
    return Image


def read_rgb(file: Path, size: int) -> Image.Image:
    """The file as RGB; a JPEG may come at a fraction of its size, but not below `size` pixels on its short side.

    Raises DataError where it cannot be read, or is so narrow that scaling its short side would fill the memory.
    """
    pil = pillow()
    try:
        with files.open_regular(file) as opened, pil.open(opened) as image:
            check_bytes(image)
            if max(image.size) > NARROWEST * min(image.size):
                raise ValueError(f"{image.size[0]}x{image.size[1]}, one side is over {NARROWEST} times the other")
            image.draft("RGB", (size, size))
            return image.convert("RGB")
    # PIL reports damaged PNGs as SyntaxError and oversized ones as DecompressionBombError.
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image ({error}); repair or remove it") from error


def check_bytes(image: Image.Image) -> None:
    """Raise ValueError for pixels of more than 8 bits: converting them would cut them off at 255 and say nothing."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}, which has more than 8 bits; scale them to bytes")


def training_crop(image: Image.Image, size: int, draw: Draw) -> np.ndarray:
    """A window of random area and aspect ratio, scaled to `size`, mirrored half of the time.

    A window that would stick out is narrowed, so that every draw gives one.
    """
    width, height = image.size
    area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * draw.area)
    ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * draw.ratio)
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    left, top = int(draw.left * (width - w + 1)), int(draw.top * (height - h + 1))
    left, top = min(left, width - w), min(top, height - h)
    crop = image.resize((size, size), pillow().Resampling.BILINEAR, box=(left, top, left + w, top + h))
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if draw.flip < 0.5 else pixels


def central_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle, after scaling the short side to 8/7 of `size`."""
    width, height = image.size
    factor = size * TEST_SCALE / min(width, height)
    scaled = image.resize(
        (max(size, round(width * factor)), max(size, round(height * factor))), pillow().Resampling.BILINEAR
    )
    left, top = (scaled.size[0] - size) // 2, (scaled.size[1] - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))
