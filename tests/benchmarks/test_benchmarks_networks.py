"""bench_networks.py runs, packs what it says, and writes the schema it promises."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lbs
from lbs.engines import ENGINES, why_not
from lbs.packing.explain import streams_of_codes
from lbs_kernels.device import default_isa

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
native = pytest.mark.skipif(default_isa() is None, reason="no native module: there is nothing to time")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_networks")


def asked(folder: Path, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(
        networks=["digits_resnet8"], threads=[1], batches=[1, 2], rounds=2, folder=folder, **others
    )


def test_images_are_smooth(bench: ModuleType) -> None:
    images = bench.smooth_images("cifar_resnet20", 4)
    assert images.shape == (4, 3, 32, 32)
    assert float(images.std()) == pytest.approx(1)
    assert float((images[..., 1:] - images[..., :-1]).std()) < 1  # of noise: sqrt(2)


@native
def test_variants_are_built_and_timed(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "why_not", lambda name: "left out of this test")
    bench.build(asked(tmp_path))
    plans = {name: lbs.load(bench.packed_file(tmp_path, "digits_resnet8", name)).plan for name in bench.BITS}
    loaded = {name: lbs.load(bench.packed_file(tmp_path, "digits_resnet8", name)) for name in bench.BITS}
    coded = {name: bool(streams_of_codes(packed.programs[0])) for name, packed in loaded.items()}
    assert coded == {name: name == "w8a8" for name in bench.BITS}
    inner = {name: plan.layers[1:-1] for name, plan in plans.items()}
    assert {layer.w_bits for layer in inner["w8a8"]} == {8}
    assert {layer.a_bits for layer in inner["w4a4"] + inner["w4a4 pruned"]} == {4}
    assert any(layer.kept_filters < layer.filters for layer in inner["w4a4 pruned"])
    rows = bench.measure(asked(tmp_path))
    assert [(row["batch"], row["contender"]) for row in rows] == [(n, name) for n in (1, 2) for name in bench.BITS]
    assert all(0 < row["fastest"] <= row["p20"] <= row["median"] <= row["p80"] for row in rows)
    assert all(sum(row["algorithms"].values()) == len(plans["w8a8"].layers) - 1 for row in rows)  # one is linear
    started = bench.start(asked(tmp_path, contender="w4a4"))
    assert started["seconds"] > 0
    assert started["peak_bytes"] >= 0


@native
@pytest.mark.slow
def test_a_file_keeps_rows_of_other_runs(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts processes, with the engines that are installed."""
    path = tmp_path / "networks.json"
    for threads, network in (
        (1, "digits_resnet8"),
        (1, "cifar_resnet20"),
        (2, "cifar_resnet20"),
        (1, "cifar_resnet20"),
    ):
        line = f"--networks {network} --threads {threads} --batches 1 --rounds 2 --starts digits_resnet8 --note busy"
        monkeypatch.setattr(sys, "argv", ["bench_networks", *line.split(), "--output", str(path)])
        bench.main()
    body = json.loads(path.read_text())
    assert (body["version"], body["level"], body["notes"]) == (1, "networks", ["busy"])
    present = [name for name in bench.RIVALS if not why_not(name)]
    engines = [ENGINES[name] for name in present]
    groups = {("digits_resnet8", 1): [], ("cifar_resnet20", 1): ["shipped"], ("cifar_resnet20", 2): ["shipped"]}
    for key, own in groups.items():
        rows = [row["contender"] for row in body["rows"] if (row["network"], row["threads"]) == key]
        assert rows == [*bench.BITS, *own, *engines]
    assert [row["contender"] for row in body["starts"]] == ["w8a8", "w4a4", *engines]
    assert len(body["missing"]) == len(bench.RIVALS) - len(present)
