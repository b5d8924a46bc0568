"""bench_quantize.py runs, reads the images it says it reads, and writes the schema it promises."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lbs
import lbs.data
import lbs.models
from lbs.errors import LbsError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_quantize")


def grey(level: int, size: tuple[int, int]) -> Image.Image:
    """Inner pixels of one level, a rim of white."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    pixels[1:-1, 1:-1] = level
    return Image.fromarray(pixels)


def test_labelled_images_are_cropped_normalised_and_halved(bench: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):  # cropped before to 227, or not at all
        grey(40 * index, (227, 227) if index % 2 else (300, 260)).save(folder / f"{index}.png")
    (folder / bench.LABELS).write_text("".join(f"{index}.png {index}\n" for index in range(6)))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, "some/images")
    one, other = bench.read_images(folder), bench.read_images(tmp_path / "images.tar")
    assert torch.equal(one.calibration, other.calibration)
    assert torch.equal(one.test, other.test)
    assert one.calibration.shape == one.test.shape == (3, 3, 224, 224)
    levels = [round(255 * (float(image[0].mean()) * 0.229 + 0.485)) for image in (*one.test, *one.calibration)]
    assert levels[:3] == [40 * int(label) for label in one.labels]
    assert sorted(levels) == [0, 40, 80, 120, 160, 200]
    assert float(one.test.flatten(2).std(2).max()) < 1e-5  # no rim is left


def test_of_arrays_training_images_calibrate(bench: ModuleType, tmp_path: Path) -> None:
    data = lbs.data.load("digits")
    path = saved(data, tmp_path)
    found = bench.read_images(path)
    assert (len(found.calibration), len(found.test)) == (bench.CALIBRATION, len(data.test_x))
    assert torch.equal(found.labels, data.test_y)
    assert abs(float(found.calibration.mean())) < 0.05


def test_a_row_under_milliseconds(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8/8 bits over a factor, filters and all; what was not measured is said."""
    args = argparse.Namespace(bops=None, faster=1.25, prune=0.5, distill=3, only_faster=True)
    plain, trained = bench.asked_rows(args)
    assert (plain.distill, trained.distill, trained.name) == (0, 3, "1.25x, up to 50% pruned, 3 epochs")
    assert len(bench.asked_rows(argparse.Namespace(**{**vars(args), "only_faster": False}))) == 8
    model, x = lbs.models.create("digits_resnet8").eval(), torch.randn(16, 1, 8, 8)
    monkeypatch.setattr(bench, "call_seconds", lambda *_, **options: None)
    with pytest.raises(LbsError, match="run lbs tune --shapes MODEL first"):
        bench.budget_of(plain, model, x)
    monkeypatch.setattr(bench, "call_seconds", lambda *_, **options: 1e-3)
    budget = bench.budget_of(plain, model, x)
    assert (budget["latency_ms"], budget["max_pruning_ratio"]) == (0.8, 0.5)
    assert bench.budget_of(bench.Asked((8, 8)), model, x) == {"bits": (8, 8), "bops": None}
    found = bench.timed(lbs.quantize(model, x), model, x, 3)
    assert found["faster"] > 0
    assert 0 < found["packed"][0] <= found["packed"][1]


@pytest.mark.slow
def test_the_accuracy_without_training_is_measured(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts a process for each row."""
    data, threads = saved(lbs.data.load("digits"), tmp_path), torch.get_num_threads()
    torch.manual_seed(0)
    torch.save(lbs.models.create("digits_resnet8").state_dict(), tmp_path / "net.pth")
    line = (
        f"--model digits_resnet8 --weights {tmp_path}/net.pth --data {data} --bops 0.03 --output {tmp_path}/found.json"
    )
    monkeypatch.setattr(sys, "argv", ["bench_quantize", *line.split()])
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    body = json.loads((tmp_path / "found.json").read_text())
    assert (body["version"], body["level"], body["header"]["model"]) == (1, "quantization", "digits_resnet8")
    assert (body["header"]["calibration"], body["header"]["test"]) == (512, 360)
    rows = body["rows"]
    assert [(row["bits"], row["rounding"]) for row in rows] == [
        *(([8, 8], "nearest"), ([8, 8], "nearest")),
        *((bits, rounding) for bits in ([4, 8], [4, 4], None) for rounding in ("nearest", "optimized")),
    ]
    assert [row["zeros"] for row in rows[:3]] == [0, 0.3, 0]
    assert all(0 <= row["top1"] <= 100 and row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert all(row["bops"] <= 0.03 * row["full_precision_bops"] for row in rows[-2:])
    assert abs(rows[0]["top1"] - rows[0]["float_top1"]) < 2
    table = importlib.import_module("readme_tables").quantization_table("results/device/quantize_net.json", body)
    assert len(table) == 4 + len(rows)


def saved(data: lbs.data.ImageData, folder: Path) -> Path:
    arrays: dict[str, Tensor] = {name: getattr(data, name) for name in ("train_x", "train_y", "test_x", "test_y")}
    np.savez(folder / "digits.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder / "digits.npz"
