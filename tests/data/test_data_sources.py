"""Image sets from files: what is written is what is read, and what is damaged or foreign is refused with a reason."""

from __future__ import annotations

import io
import math
import pickle
import re
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lbs.data
from lbs.data import folder as folder_module
from lbs.data import npz
from lbs.data.cifar100 import load_plain_pickle
from lbs.data.decode import read_rgb
from lbs_kernels.errors import DataError

RNG = np.random.default_rng(3)


def _arrays(train: int = 12, test: int = 6, size: int = 32, classes: int = 100) -> dict[str, np.ndarray]:
    return {
        "train_x": RNG.integers(0, 256, (train, size, size, 3), dtype=np.uint8),
        "train_y": RNG.integers(0, classes, train, dtype=np.uint8),
        "test_x": RNG.integers(0, 256, (test, size, size, 3), dtype=np.uint8),
        "test_y": RNG.integers(0, classes, test, dtype=np.uint8),
    }


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def _save_pickles(folder: Path, arrays: dict[str, np.ndarray], protocol: int) -> Path:
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        pixels = arrays[f"{part}_x"].transpose(0, 3, 1, 2).reshape(len(arrays[f"{part}_x"]), -1)
        content = {
            b"data": np.ascontiguousarray(pixels),
            b"fine_labels": [int(label) for label in arrays[f"{part}_y"]],
            b"coarse_labels": [0] * len(pixels),
            b"batch_label": b"part 1 of 1",
        }
        (folder / part).write_bytes(pickle.dumps(content, protocol))
    names = [f"class{i}".encode() for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol))
    return folder


def _save_folder(root: Path, arrays: dict[str, np.ndarray]) -> Path:
    for part in ("train", "test"):
        for index, (image, label) in enumerate(zip(arrays[f"{part}_x"], arrays[f"{part}_y"], strict=True)):
            folder = root / part / f"c{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:03}.png")
    return root


def _assert_holds(data: lbs.data.ImageData, arrays: dict[str, np.ndarray]) -> None:
    for key, array in arrays.items():
        assert np.array_equal(getattr(data, key).numpy(), array), key


def test_npz_round_trip_and_measured_statistics(tmp_path: Path) -> None:
    arrays = _arrays()
    arrays["train_x"][..., 1] //= 2
    data = lbs.data.load(_save_npz(tmp_path / "images.npz", arrays))
    _assert_holds(data, arrays)
    scaled = arrays["train_x"].reshape(-1, 3) / 255
    np.testing.assert_allclose(data.mean, scaled.mean(0), atol=6e-5)
    np.testing.assert_allclose(data.std, scaled.std(0), atol=6e-5)
    assert data.image_shape == (3, 32, 32)


def test_cifar100_from_npz_uses_the_published_statistics(tmp_path: Path) -> None:
    data = lbs.data.cifar100(_save_npz(tmp_path / "images.npz", _arrays()))
    assert data.mean == (0.5070, 0.4865, 0.4409)
    assert len(data.classes) == 100


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", [True, False])
def test_torchvision_layout(tmp_path: Path, protocol: int, inside: bool) -> None:
    arrays = _arrays()
    folder = _save_pickles(tmp_path / "cifar-100-python", arrays, protocol)
    data = lbs.data.load(tmp_path if inside else folder)
    _assert_holds(data, arrays)
    assert data.classes[7] == "class7"


def test_python2_pickle_with_its_str_as_bytes(tmp_path: Path) -> None:
    """The published file was written by Python 2: byte strings as BINSTRING, the array as numpy.core's _reconstruct."""
    array = bytes(range(6))
    text = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x06" + array + b"tbU\x0bfine_labels]q\x06(K\x05K\x07eu."
    )
    path = tmp_path / "train"
    path.write_bytes(text)
    content = load_plain_pickle(path)
    assert content[b"fine_labels"] == [5, 7]
    assert np.array_equal(content[b"data"], np.arange(6, dtype=np.uint8).reshape(2, 3))


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.check_call, (["touch", str(self.target)],)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_that_name_anything_else_are_refused_unrun(tmp_path: Path, protocol: int) -> None:
    target, path = tmp_path / "owned", tmp_path / "train"
    path.write_bytes(pickle.dumps({b"data": _Attack(target)}, protocol))
    with pytest.raises(DataError, match=r"\.check_call, which a CIFAR-100 file has no need of"):
        load_plain_pickle(path)
    assert not target.exists()
    for harmless in (OrderedDict(a=1), Path("x"), print, np.float64(1.0), np.zeros(3), np.array([None])):
        path.write_bytes(pickle.dumps({b"data": harmless}, protocol))
        with pytest.raises(DataError):
            load_plain_pickle(path)


def test_every_truncation_of_a_pickle_is_a_data_error(tmp_path: Path) -> None:
    whole = pickle.dumps({b"data": np.arange(12, dtype=np.uint8).reshape(2, 6), b"fine_labels": [1, 2]}, 2)
    path = tmp_path / "train"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is not a CIFAR-100 pickle"):
            load_plain_pickle(path)


def test_a_short_pickle_cannot_ask_for_a_large_table(tmp_path: Path) -> None:
    path = tmp_path / "train"
    path.write_bytes(b"\x80\x02Nr" + (1 << 27).to_bytes(4, "little") + b".")
    with pytest.raises(DataError, match="is not a CIFAR-100 pickle: it remembers an object as number 134217728"):
        load_plain_pickle(path)


def test_damaged_pickles_never_escape_as_another_error(tmp_path: Path) -> None:
    whole = bytearray(pickle.dumps({b"data": np.arange(12, dtype=np.uint8).reshape(2, 6), b"fine_labels": [1, 2]}, 4))
    path = tmp_path / "train"
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= int(RNG.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_plain_pickle(path)
        except DataError:
            refused += 1
    assert refused > len(whole) // 4


def test_image_folder_round_trip(tmp_path: Path) -> None:
    arrays = _arrays(train=8, test=4, size=9, classes=2)
    for part in ("train", "test"):
        arrays[f"{part}_y"] = np.sort(np.arange(len(arrays[f"{part}_y"])) % 2).astype(np.uint8)
    data = lbs.data.load(_save_folder(tmp_path, arrays))
    _assert_holds(data, arrays)
    assert data.classes == ("c0", "c1")
    assert lbs.data.from_folder(tmp_path, channels=1).image_shape == (1, 9, 9)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    root = _save_folder(tmp_path, _arrays(train=3, test=3, size=9, classes=1))
    broken = root / "train" / "c0" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"001\.png cannot be read as an image"):
        lbs.data.from_folder(root)
    broken.write_text("hello")
    with pytest.raises(DataError, match=r"001\.png cannot be read as an image"):
        lbs.data.from_folder(root)


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    root = _save_folder(tmp_path, _arrays(train=3, test=3, size=9, classes=1))
    Image.new("RGB", (9, 8)).save(root / "train" / "c0" / "002.png")
    with pytest.raises(DataError, match=r"002\.png is 9x8 but the images before it are 9x9"):
        lbs.data.from_folder(root)


def test_missing_class_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*train"):
        lbs.data.load(tmp_path)
    root = _save_folder(tmp_path, _arrays(train=3, test=3, size=9, classes=1))
    (root / "train" / "c9").mkdir()
    with pytest.raises(DataError, match="the classes c9 are in only one of train and test"):
        lbs.data.load(root)
    (root / "test" / "c9").mkdir()
    with pytest.raises(DataError, match="class c9 holds no images"):
        lbs.data.load(root)


def test_missing_and_damaged_npz(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at .*nothing\.npz"):
        lbs.data.load(tmp_path / "nothing.npz")
    path = _save_npz(tmp_path / "images.npz", _arrays())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images\.npz"):
            lbs.data.load(path)
    middle = bytearray(whole)
    middle[2000] ^= 1
    path.write_bytes(middle)
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        lbs.data.load(path)


def test_npz_with_two_entries_of_a_name_is_refused(tmp_path: Path) -> None:
    """numpy would read the entry without .npy, whose claims nobody has looked at."""
    path = _save_npz(tmp_path / "images.npz", _arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_x", archive.read("test_x.npy"))
    with pytest.raises(DataError, match=r"holds an entry train_x beside train_x\.npy"):
        lbs.data.load(path)


def test_images_of_more_than_bytes_are_refused(tmp_path: Path) -> None:
    for dtype in (">u2", "<u2", np.int64):
        with pytest.raises(DataError, match=r"train_x holds .*; images must be uint8"):
            lbs.data.load(_save_npz(tmp_path / "wide.npz", {**_arrays(), "train_x": np.zeros((12, 32, 32, 3), dtype)}))
    file = tmp_path / "grey16.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(file)
    for call in (lambda: read_rgb(file, 8), lambda: folder_module._read_image(file, 1)):
        with pytest.raises(DataError, match="pixels of mode I;16, which has more than 8 bits; scale them to bytes"):
            call()


def test_npz_with_objects_or_a_missing_array_is_refused(tmp_path: Path) -> None:
    arrays = _arrays()
    path = _save_npz(tmp_path / "images.npz", {**arrays, "train_y": np.array([None] * 12)})
    with pytest.raises(DataError, match="allow_pickle"):
        lbs.data.load(path)
    del arrays["test_y"]
    with pytest.raises(DataError, match="lacks the arrays test_y"):
        lbs.data.load(_save_npz(path, arrays))


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 10, 1 << 10, 3), (12, 32, 32, 4), (12, 32, 31, 3)])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_that_claims_other_sizes_is_refused_before_memory_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], compression: int
) -> None:
    path = tmp_path / "images.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, array in _arrays().items():
            buffer = io.BytesIO()
            claim = {
                "descr": array.dtype.str,
                "fortran_order": False,
                "shape": shape if key == "train_x" else array.shape,
            }
            np.lib.format.write_array_header_1_0(buffer, claim)
            archive.writestr(f"{key}.npy", buffer.getvalue() + array.tobytes())
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: pytest.fail("the array was read"))
    with pytest.raises(DataError, match=r"train_x\.npy of shape .* claims \d+ bytes, the archive holds 36864"):
        lbs.data.load(path)


@pytest.mark.parametrize("free", [300 << 20, 256 << 20])
def test_npz_that_is_a_bomb_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """290 MiB of zeros, truthfully described, in a file of 300 KiB. They are only read where the rule allows them."""
    path, size = tmp_path / "images.npz", 290 << 20
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in _arrays().items():
            shape = (size // 3072, 32, 32, 3) if key == "train_x" else array.shape
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                claim = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, claim)  # type: ignore[arg-type]
                left = math.prod(shape)
                while left:
                    left -= file.write(zeros[:left])
    assert path.stat().st_size < 400_000
    read: list[str] = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: read.append(key) or np.zeros(1))
    monkeypatch.setattr(npz, "FREE_BYTES", free)
    if free > size:
        npz.read_npz(path)
        assert read == list(npz.KEYS)
        return
    with pytest.raises(DataError, match=r"images\.npz: \d{6} bytes expand to 304\d+; .* numpy\.savez, which does not"):
        lbs.data.load(path)
    assert not read


@pytest.mark.parametrize(
    ("images", "pixels", "ratio"),
    [
        (60_000, 32 * 32 * 3, 1000.0),  # of CIFAR-100's size, whatever it holds
        (1_331_167, 32 * 32 * 3, 1.0),  # ImageNet at 32 x 32, stored
        (1_331_167, 32 * 32 * 3, 1.1),  # and compressed
        (1_331_167, 64 * 64 * 3, 2.0),
        (70_000, 28 * 28, 5.0),  # MNIST
        (32_460, 105 * 105, 60.0),  # drawings of lines, one byte a pixel
    ],
)
def test_real_image_sets_are_no_bombs(images: int, pixels: int, ratio: float) -> None:
    size = images * (pixels + 8)
    assert not npz.expands_too_far(size, int(size / ratio))
    assert npz.expands_too_far((1 << 30) + 64 * 4, 1 << 20)


def test_npz_of_foreign_make_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("train_x", "train_y", "test_x", "test_y"):
            archive.writestr(key, b"raw bytes")
    with pytest.raises(DataError, match="not a readable"):
        lbs.data.load(path)


@pytest.mark.parametrize("label", [1 << 16, 1 << 62])
def test_labels_too_high_to_be_classes_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=f"the highest label is {label}"):
        lbs.data.from_arrays("set", {**_arrays(), "train_y": np.full(12, label, np.uint64)})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_x", np.zeros((12, 3, 32, 32), np.uint8), "channels, must be 1 or 3"),
        ("train_x", np.zeros((12, 32, 32), np.uint8), r"must be uint8 \[N, H, W, C\]"),
        ("train_x", np.zeros((12, 32, 32, 3), np.float32), "train_x holds float32"),
        ("train_x", np.zeros((12, 32, 32, 3), np.int64), "holds int64"),
        ("train_y", np.zeros(11, np.uint8), "for 12 images"),
        ("train_y", np.full(12, -1, np.int8), "labels go from -1 to -1"),
        ("test_x", np.zeros((6, 32, 31, 3), np.uint8), "both must have one size"),
        ("test_x", np.zeros((0, 32, 32, 3), np.uint8), "must not be empty"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: np.ndarray, message: str) -> None:
    path = _save_npz(tmp_path / "images.npz", {**_arrays(), key: value})
    with pytest.raises(DataError, match=message):
        lbs.data.from_npz(path)


def test_cifar100_refuses_images_and_labels_of_another_set(tmp_path: Path) -> None:
    path = _save_npz(tmp_path / "images.npz", _arrays(size=28))
    with pytest.raises(DataError, match="CIFAR-100 images are"):
        lbs.data.cifar100(path)
    _save_npz(path, {**_arrays(), "train_y": np.full(12, 100, np.uint8)})
    with pytest.raises(DataError, match=r"100; of 100 classes they must lie in 0\.\.99"):
        lbs.data.cifar100(path)


def test_digits_are_split_without_overlap() -> None:
    data = lbs.data.digits()
    assert (len(data.train_x), len(data.test_x), data.image_shape) == (1437, 360, (1, 8, 8))
    assert int(data.train_x.max()) == 255
    assert torch.bincount(data.test_y, minlength=10).min() > 20
    assert torch.equal(lbs.data.digits().test_x, data.test_x)
    assert not torch.equal(lbs.data.digits(seed=1).test_x, data.test_x)


def test_synthetic_images_can_be_told_apart() -> None:
    data = lbs.data.synthetic(classes=4, train=200, test=100, size=10)
    centres = torch.stack([data.train_x[data.train_y == c].float().mean(0).flatten() for c in range(4)])
    nearest = torch.cdist(data.test_x.float().flatten(1), centres).argmin(1)
    assert (nearest == data.test_y).float().mean() > 0.95
    with pytest.raises(DataError, match="must be >= 1"):
        lbs.data.synthetic(classes=0)


def listed(root: Path, labels: dict[str, dict[str, str]], name: str = "labels.txt", between: str = " ") -> Path:
    """Parts of images in any folders, 4 x 4 and of one colour each, with lists of their classes."""
    for part, classes in labels.items():
        for index, file in enumerate(classes):
            path = root / part / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (index, 0, len(part))).save(path)
        lines = [f"{file}{between}{label}\n" for file, label in classes.items()]
        (root / part / name).write_text("".join(lines))
    return root


NAMED = {
    "train": {"b.png": "dog", "deep/a 1.png": "cat", "deep/c.png": "dog"},
    "val": {"x.png": "cat", "y.png": "dog"},
}


@pytest.mark.parametrize(("name", "between"), [("labels.txt", " "), ("labels.csv", ","), ("labels.txt", "  ")])
def test_a_list_of_labels_takes_the_place_of_class_folders(tmp_path: Path, name: str, between: str) -> None:
    data = lbs.data.load(listed(tmp_path, NAMED, name, between))
    assert data.classes == ("cat", "dog")
    assert data.train_y.tolist() == [0, 1, 1]
    assert data.train_x[:, 0, 0, 0].tolist() == [1, 0, 2]  # by class, then by name
    assert data.test_y.tolist() == [0, 1]
    streamed = lbs.data.load(f"imagenet:{tmp_path}")
    assert (streamed.classes, streamed.train.labels) == (("cat", "dog"), (0, 1, 1))
    assert [file.name for file in streamed.train.files] == ["a 1.png", "b.png", "c.png"]


def test_classes_that_are_numbers_keep_them(tmp_path: Path) -> None:
    """As lists of ImageNet have them: a part need not show every class."""
    data = lbs.data.load(listed(tmp_path, {"train": {"a.png": "10", "b.png": "2"}, "test": {"c.png": "2"}}))
    assert len(data.classes) == 11
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([2, 10], [2])


ODD_LISTS = {
    "a.png cat\n": "b.png is not listed in labels.txt, as 1 more",
    "a.png cat\nb.png dog\ndeep/c.png dog\nd.png cat\n": "d.png is listed in labels.txt and no image there",
    "a.png cat\na.png dog\n": "line 2: a.png is listed a second time",
    "a.png\n": "line 1: 'a.png' is no path below",
    "../a.png cat\n": "line 1: '../a.png cat' is no path below",
    "/a.png cat\n": "line 1: '/a.png cat' is no path below",
    "a.png 70000\nb.png 1\ndeep/c.png 2\n": "class 70000 is listed; numbers of classes are below 65536",
}


@pytest.mark.parametrize("text", ODD_LISTS)
def test_a_list_that_does_not_fit_its_images_is_refused(tmp_path: Path, text: str) -> None:
    numbers = text.startswith("a.png 7")
    last = {"x.png": "1" if numbers else "cat"}
    listed(tmp_path, {"train": {"a.png": "cat", "b.png": "dog", "deep/c.png": "dog"}, "test": last})
    (tmp_path / "train" / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(ODD_LISTS[text])):
        lbs.data.load(tmp_path)


def test_without_classes_and_list_both_ways_are_named(tmp_path: Path) -> None:
    listed(tmp_path, NAMED)
    (tmp_path / "train" / "labels.txt").unlink()
    for file in (tmp_path / "train" / "deep").iterdir():
        file.unlink()
    (tmp_path / "train" / "deep").rmdir()
    with pytest.raises(DataError, match=r"<class>/\*\.png, or with their classes in .*labels\.txt"):
        lbs.data.load(tmp_path)
