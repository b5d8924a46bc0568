"""`lbs classify`: every image once and in order, damaged ones named, the same file from one process and from two."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pack_nets
import pytest
import torch
from PIL import Image
from torch import nn

import lbs
import lbs.data
import lbs.zoo
from lbs.cli import main
from lbs.data.pictures import read_pictures

ENTRY = lbs.zoo.entry("cifar100-resnet20")
COUNT = 13


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes in two folders, a damaged one between them, and something that is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    chance = np.random.default_rng(0)
    for number in range(COUNT):
        place = folder / ("b" if number % 2 else "a")
        place.mkdir(exist_ok=True)
        pixels = chance.integers(0, 256, (32 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02d}, x.png")
    (folder / "a" / "03.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no image")
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def classify(out: Path, *words: object) -> tuple[int, list[dict[str, str]]]:
    code = main.main(["classify", "--zoo", ENTRY.name, "--out", str(out), "--threads", "1", *map(str, words)])
    return code, rows_of(out) if out.exists() else []


def test_every_image_once_in_order_and_as_the_network_says(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {place}" for place in range(100)))
    code, rows = classify(tmp_path / "out.csv", "--images", images, "--names", names, "--batch", "4")
    assert code == 0
    assert [row["image"] for row in rows] == sorted(
        str(file.relative_to(images)) for file in images.rglob("*") if file.suffix in (".png", ".jpg")
    )
    (damaged,) = (row for row in rows if row["error"])
    assert (damaged["image"], damaged["class"], damaged["name"]) == ("a/03.jpg", "", "")
    assert "cannot be read as an image" in damaged["error"]
    told = capsys.readouterr().out
    assert f"left out: {damaged['error']}" in told
    assert f"{COUNT} of {COUNT + 1} images classified: " in told
    pictures, _ = read_pictures(images, COUNT + 1, size=32)
    logits = lbs.load(ENTRY.path)(lbs.data.normalize(pictures.permute(0, 2, 3, 1), ENTRY.mean, ENTRY.std))
    good = [row for row in rows if not row["error"]]
    assert [int(row["class"]) for row in good] == logits.argmax(1).tolist()
    assert [row["name"] for row in good] == [f"name {row['class']}" for row in good]
    shares = torch.tensor([float(row["probability"]) for row in good], dtype=torch.float64)
    torch.testing.assert_close(shares, logits.double().softmax(1).amax(1), atol=1e-6, rtol=0)


def test_batches_do_not_matter(images: Path, tmp_path: Path) -> None:
    texts = []
    for batch in (1, 5, 64):
        assert classify(tmp_path / f"{batch}.csv", "--images", images, "--batch", batch)[0] == 0
        texts.append((tmp_path / f"{batch}.csv").read_bytes())
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--images", "absent"), "no folder absent"),
        (("--images", "{empty}"), "holds no file that ends in"),
        (("--images", "{images}", "--batch", "0"), "--batch 0|batch is 0"),
        (("--images", "{images}", "--mean", ".5"), "--mean and --std belong together"),
        (("--images", "{images}", "--names", "{images}/notes.txt"), "1 names for 100 classes"),
        (("--images", "{images}", "--names", "absent.txt"), "absent.txt cannot be read"),
        (("--images", "{images}", "--names", "{empty}/none.txt"), "none.txt holds no names; give"),
        (("--images", "absent", "--out", "{empty}"), "empty could not be written.* it is a folder; .* give a path"),
        (("--images", "absent", "--out", "{images}/notes.txt/x.csv"), "x.csv could not be written"),
        (("--images", "absent", "--names", "{images}/notes.txt"), "1 names for 100 classes"),
        (("--images", "{damaged}"), "no image of .* can be read"),
    ],
)
def test_what_cannot_be_is_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "none.txt").write_text("\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "x.png").write_bytes(b"")
    places: dict[str, Any] = {"images": images, "empty": tmp_path / "empty", "damaged": tmp_path / "damaged"}
    code, rows = classify(tmp_path / "out.csv", *(word.format(**places) for word in words))
    assert (code, rows) == (2, [])
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("shape", [(3, 20), (16,)])
@pytest.mark.parametrize("command", ["classify", "bench"])
def test_a_network_that_takes_no_pictures_is_named(
    command: str, shape: tuple[int, ...], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first: nn.Module = nn.Linear(16, 8) if len(shape) == 1 else nn.Conv1d(3, 8, 3)
    rest = [] if len(shape) == 1 else [nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    network = nn.Sequential(first, nn.ReLU(), *rest, nn.Linear(8, 4))
    lbs.pack(pack_nets.quantized(network, shape), verify=False).save(tmp_path / "net.lbs.safetensors")
    words = ["--images", str(images), *(("--out", str(tmp_path / "out.csv")) if command == "classify" else ())]
    assert main.main([command, str(tmp_path / "net.lbs.safetensors"), *words]) == 2
    wanted = ", ".join(map(str, shape))
    assert f"takes [N, {wanted}], pictures are [N, C, H, W]; call it in Python" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(images: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += [
        "--master-port",
        str(port),
        "-m",
        "--",
        "lbs",
        "classify",
        "--zoo",
        ENTRY.name,
        "--json",
        "--threads",
        "1",
    ]
    command += ["--images", str(images), "--out", str(tmp_path / "two.csv"), "--batch", "3"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["processes"], told["images"], list(told["unreadable"])) == (2, COUNT + 1, ["a/03.jpg"])
    assert classify(tmp_path / "one.csv", "--images", images)[0] == 0
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
