"""Pictures of any folder: which are taken, at what size, and what is told of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lbs.data.pictures import read_pictures
from lbs_kernels.errors import DataError


def folder_of(path: Path, count: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Pictures in two folders; the red channel of each is its number."""
    for index in range(count):
        place = path / f"{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        pixels[..., 0] = index
        Image.fromarray(pixels).save(place / f"{index:03d}.png")
    return path


def test_all_folders_are_read_in_name_order(tmp_path: Path) -> None:
    pictures, unread = read_pictures(folder_of(tmp_path, 6), 100)
    assert (pictures.dtype, pictures.shape, unread) == (torch.uint8, (6, 3, 8, 8), {})
    assert pictures[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]


def test_fewer_are_spread_over_all_folders(tmp_path: Path) -> None:
    pictures, _ = read_pictures(folder_of(tmp_path, 20), 4)
    assert pictures[:, 0, 0, 0].tolist() == [0, 10, 1, 11]


def test_grey_and_colour(tmp_path: Path) -> None:
    folder_of(tmp_path, 3)
    assert read_pictures(tmp_path, 3, channels=1)[0].shape == (3, 1, 8, 8)
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert read_pictures(tmp_path, 4, channels=1)[0][-1].unique().tolist() == [77]
    assert read_pictures(tmp_path, 4)[0][-1].unique().tolist() == [77]


def test_others_are_scaled_and_cropped_and_those_of_the_size_are_left_alone(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    exact = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(exact).save(tmp_path / "a.png")
    Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "b.jpg")
    pictures, _ = read_pictures(tmp_path, 2, size=16)
    assert pictures.shape == (2, 3, 16, 16)
    assert np.array_equal(pictures[0].permute(1, 2, 0).numpy(), exact)


def test_unreadable_files_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    pictures, unread = read_pictures(tmp_path, 10)
    assert len(pictures) == 2
    assert list(unread) == [str(tmp_path / "bad.png")]
    assert "cannot be read as an image" in unread[str(tmp_path / "bad.png")]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*nowhere; give one"):
        read_pictures(tmp_path / "nowhere", 1)
    with pytest.raises(DataError, match=r"no image of .* can be read: it holds no file that ends in \.png"):
        read_pictures(tmp_path, 1)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no image of .* can be read: .*bad\.png cannot be read"):
        read_pictures(tmp_path, 1)
    folder_of(tmp_path, 1)
    folder_of(tmp_path / "wide", 1, (12, 8))
    with pytest.raises(DataError, match=r"000\.png is 12x8, those before it are 8x8; give size=, such as 224"):
        read_pictures(tmp_path, 10)
    with pytest.raises(DataError, match="channels is 2"):
        read_pictures(tmp_path, 10, channels=2)
    with pytest.raises(DataError, match="0 images of size None"):
        read_pictures(tmp_path, 0)
