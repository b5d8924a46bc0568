"""TensorLoader: normalisation, augmentation and resumption, each against a slow definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbs.data import TensorLoader, crop_and_flip, normalize
from lbs_kernels.errors import DataError, TrainingError

MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)


def _images(count: int, height: int = 6, width: int = 5, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)


def _loader(count: int = 23, **options: object) -> TensorLoader:
    settings = {"mean": MEAN, "std": STD, "batch_size": 4, "shuffle": True, "augment": True, "seed": 5, **options}
    return TensorLoader(_images(count), torch.arange(count), **settings)


def test_normalize_equals_the_definition_in_float32() -> None:
    images = _images(3)
    expected = np.empty((3, 3, 6, 5), np.float32)
    for channel in range(3):
        scaled = images[..., channel].numpy().astype(np.float32) / np.float32(255)
        expected[:, channel] = (scaled - np.float32(MEAN[channel])) / np.float32(STD[channel])
    result = normalize(images, MEAN, STD)
    assert torch.equal(result, torch.from_numpy(expected))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_crop_pads_with_black_pixels_and_flips_the_window() -> None:
    images = _images(40, seed=1)
    rng = np.random.default_rng(2)
    offsets, flips = rng.integers(0, 9, (40, 2)), rng.random(40) < 0.5
    offsets[:4] = [[0, 0], [8, 8], [0, 8], [4, 4]]
    result = crop_and_flip(images, torch.from_numpy(offsets), torch.from_numpy(flips))
    for index in range(40):
        padded = np.pad(images[index].numpy(), ((4, 4), (4, 4), (0, 0)))
        row, column = offsets[index]
        window = padded[row : row + 6, column : column + 5]
        assert np.array_equal(result[index].numpy(), window[:, ::-1] if flips[index] else window)
    assert (result == 0).any(), "the sample never reached the padding"


def test_padding_is_black_after_normalisation_too() -> None:
    loader = TensorLoader(_images(64), torch.zeros(64), mean=MEAN, std=STD, batch_size=64, augment=True, seed=0)
    images, _ = next(iter(loader))
    black = normalize(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), MEAN, STD)[0, :, 0, 0]
    corner = images[:, :, 0, 0]
    assert (corner == black).all(dim=1).sum() > 10
    assert not (images == 0).any()


def test_every_image_comes_once_an_epoch_with_its_label() -> None:
    loader = _loader(augment=False)
    plain = normalize(loader.images, MEAN, STD)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [4, 4, 4, 4, 4, 3]
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == list(range(23))
    assert labels.tolist() != list(range(23))
    assert torch.equal(torch.cat([x for x, _ in batches]), plain[labels])


def test_epochs_depend_on_seed_and_number_only() -> None:
    loader, again, other = _loader(), _loader(), _loader(seed=6)
    first, second = list(loader), list(loader)
    list(again)
    repeated = list(again)
    for (x, y), (x2, y2) in zip(second, repeated, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(first[0][1], second[0][1])
    assert not torch.equal(first[0][1], next(iter(other))[1])


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resuming_gives_the_batches_that_were_left(stop: int) -> None:
    whole = _loader()
    expected = list(whole) + list(whole)
    part = _loader()
    stream = iter(part)
    for _ in range(stop):
        next(stream)
    resumed = _loader()
    resumed.load_state_dict(part.state_dict())
    rest = list(resumed)
    if stop < len(resumed):
        rest += list(resumed)
    for (x, y), (x2, y2) in zip(expected[stop:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_a_loop_left_early_starts_its_epoch_again() -> None:
    loader = _loader()
    first = next(iter(loader))[1]
    assert torch.equal(first, next(iter(loader))[1])
    assert len(list(loader)) == len(loader)


def test_drop_last_leaves_whole_batches() -> None:
    loader = _loader(drop_last=True)
    assert [len(y) for _, y in loader] == [4] * 5
    assert len(loader) == 5


def test_position_of_other_settings_is_refused() -> None:
    with pytest.raises(TrainingError, match="seed = 5, this one 6"):
        _loader(seed=6).load_state_dict(_loader().state_dict())
    with pytest.raises(TrainingError, match="batch 6"):
        _loader().load_state_dict({**_loader().state_dict(), "batch": 6})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 24, "drop_last": True}, "leaves no batch of 23"),
        ({"padding": -1}, "padding is -1"),
        ({"mean": (0.5,)}, "mean has 1 and std 3"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _loader(**change)


def test_float_images_and_missing_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"torch.float32 \(2, 6, 5, 3\)"):
        TensorLoader(_images(2).float(), torch.arange(2), mean=MEAN, std=STD, batch_size=1)
    with pytest.raises(DataError, match="2 images and 3 labels"):
        TensorLoader(_images(2), torch.arange(3), mean=MEAN, std=STD, batch_size=1)
