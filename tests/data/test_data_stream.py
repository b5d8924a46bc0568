"""Streamed image folders: what is decoded, order and crops by seed alone, shards, resumption, unreadable files."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lbs.data
from lbs.data.decode import Draw, central_crop, read_rgb, training_crop
from lbs.data.stream import FolderData, stream_folder
from lbs_kernels.errors import DataError, TrainingError

SIZE = 16
TRAIN, TEST = 24, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of JPEGs of many sizes; grey, palette and CMYK files among them."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(5)
    for part, count in (("train", TRAIN), ("val", TEST)):
        for index in range(count):
            place = root / part / f"c{index % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (18 + index, 40 - index, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK", "RGB")[index % 4])
            image.save(place / f"{index:03}.JPEG", quality=95)
    return root


def loader(root: Path, **options: object) -> lbs.data.FolderLoader:
    return stream_folder(root, SIZE).train_loader(6, **{"seed": 3, "workers": 2, **options})


def batches(made: lbs.data.FolderLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(made)


def test_the_listing_and_what_it_is_known_by(folder: Path, tmp_path: Path) -> None:
    data = lbs.data.load(f"imagenet:{folder}")
    assert isinstance(data, FolderData)
    assert (data.train_count, data.test_count, data.classes) == (TRAIN, TEST, ("c0", "c1", "c2"))
    assert data.image_shape == (3, 224, 224)
    assert data.fingerprint == stream_folder(folder).fingerprint
    part = data.subset(7, seed=1)
    assert part.train_count == 7
    assert part.subset(7, seed=1) != data.subset(7, seed=2)
    with pytest.raises(DataError, match="ask for at most all"):
        data.subset(TRAIN + 1, 0)
    with pytest.raises(DataError, match="no folder"):
        lbs.data.load(f"imagenet:{tmp_path}")


def test_training_batches_depend_on_seed_and_epoch_alone(folder: Path) -> None:
    made = loader(folder)
    first, second = batches(made), batches(made)
    assert len(first) == len(made) == TRAIN // 6
    assert first[0][0].shape == (6, 3, SIZE, SIZE)
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)
    again = batches(loader(folder, workers=1))
    assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], batches(loader(folder, seed=4))[0][0])
    assert sorted(torch.cat([y for _, y in first]).tolist()) == sorted([0, 1, 2] * (TRAIN // 3))


def test_two_shards_make_up_the_batches_of_one(folder: Path) -> None:
    whole = batches(loader(folder))
    shards = [batches(loader(folder, rank=rank, world_size=2)) for rank in range(2)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *shards, strict=True):
        assert torch.equal(x[0::2], x0)
        assert torch.equal(x[1::2], x1)
        assert torch.equal(y[1::2], y1)
        assert len(y0) == 3
    tests = [stream_folder(folder, SIZE).test_loader(4, rank=rank, world_size=2, workers=1) for rank in range(2)]
    assert sum(len(y) for x, y in itertools.chain(*tests)) == TEST


def test_an_epoch_goes_on_where_it_was(folder: Path) -> None:
    whole = loader(folder)
    expected = batches(whole) + batches(whole)
    stopped = loader(folder)
    for _ in itertools.islice(stopped, 3):
        pass
    state = stopped.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 3)
    resumed = loader(folder)
    resumed.load_state_dict(state)
    rest = batches(resumed) + batches(resumed)
    assert len(rest) == 5
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, expected[3:], strict=True))
    with pytest.raises(TrainingError, match=r"processes = 1, this one 2"):
        loader(folder, world_size=2).load_state_dict(state)


def test_crops_are_what_they_say() -> None:
    ramp = np.zeros((32, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(32)[:, None] * 8
    image = Image.fromarray(ramp)
    whole = training_crop(image, 32, Draw(area=1.0, ratio=1.0, left=0.0, top=0.0, flip=0.9))
    assert whole.shape == (32, 32, 3)
    assert whole[0, 0, 0] < whole[0, -1, 0]
    mirrored = training_crop(image, 32, Draw(area=1.0, ratio=1.0, left=0.0, top=0.0, flip=0.1))
    assert np.array_equal(mirrored, whole[:, ::-1])
    small = training_crop(image, 8, Draw(area=0.0, ratio=0.5, left=0.999, top=0.999, flip=0.9))
    assert small[..., 0].min() > 180  # 8 % of the area, at the lower right
    assert small[..., 1].min() > 120
    middle = central_crop(image, 28)  # scaled to 64 x 32: unchanged
    assert np.array_equal(middle, ramp[2:30, 18:46])
    for draw in np.random.default_rng(0).random((200, 5)):
        assert training_crop(Image.new("RGB", (3, 50)), 4, Draw(*draw)).shape == (4, 4, 3)


def damaged(folder: Path, root: Path, part: str, names: list[str]) -> Path:
    """A copy in which some files are cut short."""
    for file in folder.rglob("*.JPEG"):
        target = root / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        target.write_bytes(content[:60] if file.parent.parent.name == part and file.stem in names else content)
    return root


@pytest.mark.filterwarnings("ignore:left out")
def test_unreadable_images_are_named_counted_and_fail_above_the_stated_share(folder: Path, tmp_path: Path) -> None:
    root = damaged(folder, tmp_path / "copy", "train", ["004", "017"])
    with pytest.raises(
        DataError, match=r"1 of 24 images cannot be read, at most 0.00% .*0(04|17)\.JPEG cannot be read"
    ):
        batches(loader(root))
    tolerant = stream_folder(root, SIZE, max_unreadable=0.1).train_loader(6, seed=3, workers=2)
    found = batches(tolerant)
    assert [len(y) for _, y in found] == [6] * 4  # steps keep their size
    assert sorted(Path(file).stem for file in tolerant.unreadable) == ["004", "017"]
    for (x, _), (full, _) in zip(found, batches(loader(folder)), strict=True):
        assert sum(bool((x[i] == full[i]).all()) for i in range(6)) >= 4  # all others are where they were
    with pytest.raises(DataError, match=r"2 of 24 images cannot be read, at most 5\.00%"):
        batches(stream_folder(root, SIZE, max_unreadable=0.05).train_loader(6, seed=3, workers=2))
    with pytest.raises(DataError, match=r"004\.JPEG cannot be read as an image"):
        read_rgb(root / "train/c1/004.JPEG", SIZE)


@pytest.mark.filterwarnings("ignore:left out")
def test_unreadable_test_images_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    root = damaged(folder, tmp_path / "copy", "val", ["001"])
    found = batches(stream_folder(root, SIZE, max_unreadable=0.2).test_loader(4, workers=2))
    assert sum(len(y) for _, y in found) == TEST - 1


@pytest.mark.filterwarnings("ignore:left out")
def test_a_last_batch_of_unreadable_test_images_is_left_out(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    listing = stream_folder(root, SIZE).test.files
    listing[-1].write_bytes(b"no image")
    data = stream_folder(root, SIZE, max_unreadable=0.2)
    with pytest.warns(UserWarning, match="left out"):
        found = list(data.test_loader(TEST - 1))
    assert [len(y) for _, y in found] == [TEST - 1]
    with pytest.warns(UserWarning, match="left out"):  # one of nine, though all that was asked for
        pixels, labels = data.pixels_at(torch.tensor([TEST - 1]))
    assert pixels.shape == (0, SIZE, SIZE, 3)
    assert len(labels) == 0


def test_an_image_narrow_enough_to_fill_the_memory_is_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(DataError, match="60000x1, one side is over 64 times the other"):
        read_rgb(tmp_path / "line.png", SIZE)


def test_test_images_are_never_decoded_smaller_than_they_are_scaled_to(tmp_path: Path) -> None:
    """480 pixels may come as 240, which is enough for a crop of 224 and too few for its surroundings of 256."""
    for part in ("train", "val"):
        (tmp_path / part / "c").mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / part / "c/0.jpg", quality=95)
    whole = Image.open(tmp_path / "val/c/0.jpg").convert("RGB")
    pixels, _ = stream_folder(tmp_path).pixels_at(torch.tensor([0]))
    assert np.array_equal(pixels[0].numpy(), central_crop(whole, 224))


def test_folders_in_memory_leave_out_no_more_than_they_may(tmp_path: Path) -> None:
    for part, label, index in itertools.product(("train", "test"), range(2), range(5)):
        place = tmp_path / part / f"c{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, label, 0)).save(place / f"{index}.png")
    (tmp_path / "train/c1/2.png").write_bytes(b"no image")
    (tmp_path / "train/c0/4.png").write_bytes(b"")
    data = lbs.data.load(tmp_path, max_unreadable=0.2)
    assert (data.train_count, data.test_count) == (8, 10)
    assert isinstance(data, lbs.data.ImageData)
    assert sorted(Path(file).name for file in data.unreadable) == ["2.png", "4.png"]
    assert all("cannot be read as an image" in reason for reason in data.subset(4, seed=0).unreadable.values())
    with pytest.raises(DataError, match=r"2 of 10 images cannot be read, at most 10.00% .*4\.png.*2\.png"):
        lbs.data.load(tmp_path, max_unreadable=0.1)
