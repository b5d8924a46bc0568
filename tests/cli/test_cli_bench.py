"""`lbs bench`: images from a data set or a folder of pictures, the float network of a file by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pack_nets
import pytest
from PIL import Image

import lbs
import lbs.models
from lbs.cli import main
from lbs.packing.model import PackedModel
from lbs.train import checkpoint

QUICK = ["--threads", "1", "--rounds", "1", "--batches", "2", "--baselines", "float32,uniform8", "--json"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "digits.lbs.safetensors"
    pack_nets.packed_digits().save(path)
    return path


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    code = main.main(["bench", *map(str, words), *QUICK])
    printed = capsys.readouterr()
    return code, json.loads(printed.out), printed.err


def test_a_labelled_set_gives_accuracies(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "float.safetensors"
    checkpoint.save_weights(weights, lbs.models.create("digits_resnet8", 10))
    code, body, told = bench(
        capsys, file, "--model", "digits_resnet8", "--weights", weights, "--data", "digits", "--count", "9"
    )
    assert code == 0, told
    assert "images: 9 of digits" in told
    assert body["images"] == 9
    assert body["accuracy"].keys() == {"packed", "torch float32", "packed uniform 8-bit"}


def test_pictures_without_labels_are_compared_with_float(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    options = ("--images", tmp_path, "--mean", ".5", "--std", ".5")
    code, body, told = bench(capsys, file, "--model", "digits_resnet8", *options)
    assert code == 0, told
    assert f"images: 3 of {tmp_path}, 1 more cannot be read" in told
    assert body["accuracy"] == {}
    assert body["agreement"]["torch float32"] == 1.0
    code, body, _ = bench(capsys, file, "--images", tmp_path)
    assert code == 2
    assert "0 means and 0 deviations for images of 1 channels; give --mean" in body["error"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "digits", "--images", "x"), "--data and --images both name images"),
        (("--data", "synthetic"), r"images of synthetic are \(3, 32, 32\), the network is for \(1, 8, 8\)"),
        (("--data", "digits", "--count", "0"), "0 images; at least 1 is needed"),
        (("--count", "9"), "--count, --mean and --std are of images, and none are named; give --data"),
        (("--mean", ".5", "--std", ".5"), "none are named; give --data"),
        (("--data", "digits", "--mean", ".5"), "--mean and --std belong together"),
        (("--model", "nothing"), "nothing"),
        (("--weights", "w.pth"), "--weights w.pth needs --model"),
    ],
)
def test_what_cannot_be_is_said(file: Path, capsys: pytest.CaptureFixture[str], words: Any, says: str) -> None:
    code, body, _ = bench(capsys, file, *words)
    assert code == 2
    assert re.search(says, body["error"]), body


def test_what_was_not_given_is_named_as_an_option(file: Path) -> None:
    found = lbs.bench(lbs.load(file), batches=(1,), threads=1, rounds=1)
    told = main.as_options(str(found), "bench")
    assert "not timed: torch float32: no float network was given (--model)" in told


def test_bytes_are_given_as_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = lbs.pack(pack_nets.network("digits_resnet8", 8, 8), normalize=((0.3,), (0.4,)))
    assert isinstance(packed, PackedModel)
    packed.save(tmp_path / "bytes.lbs.safetensors")
    code, body, told = bench(capsys, tmp_path / "bytes.lbs.safetensors", "--data", "digits", "--count", "5")
    assert code == 0, told
    assert "packed" in body["accuracy"]
    for source in (("--data", "digits"), ("--images", tmp_path)):
        words = (tmp_path / "bytes.lbs.safetensors", *source, "--mean", ".3", "--std", ".4")
        code, body, _ = bench(capsys, *words)
        assert (code, "takes bytes and normalises them itself; leave them out" in body["error"]) == (2, True)
