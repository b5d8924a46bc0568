from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lbs_kernels import extension
from lbs_kernels.device import cpu_name
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.program.problem import Problem
from lbs_kernels.run import backends
from lbs_kernels.times import table as tuning_table
from lbs_kernels.times.table import TuningTable, device_slug

PROBLEM = Problem("bitconv2d", 1, 8, 8, 16, 32, (3, 3), padding=(1, 1), w_bits=4, a_bits=2)
KEY = tuning_table.key(PROBLEM)


@pytest.fixture(autouse=True)
def empty_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No measured times but those a test writes."""
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path / "mine"))
    monkeypatch.setattr(tuning_table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning_table, "device_slug", lambda device: device)
    tuning_table.load.cache_clear()
    yield tmp_path
    tuning_table.load.cache_clear()


def test_the_default_is_native_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device_type: None)
    assert backends.resolve("auto", "cpu") == "cpu"
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device_type: "no compiler")
    assert backends.resolve("auto", "cpu") == "reference"
    assert backends.resolve("auto", "meta") == "reference"


def test_a_named_backend_that_cannot_serve_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device_type: "no compiler")
    with pytest.raises(BackendError, match="'cpu' cannot run here: no compiler"):
        backends.resolve("cpu", "cpu")
    with pytest.raises(BackendError, match="'fpga' does not exist"):
        backends.resolve("fpga", "cpu")


def test_reasons() -> None:
    assert "runs on the processor" in str(backends.why_not("cpu", "cuda"))
    assert backends.why_not("reference", "cuda") is None
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert backends.why_not("triton", "cpu") is not None


def test_a_missing_native_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "cpu_reason", "no C++17 compiler was found; to mend it: apt-get install g++")
    assert backends.resolve("auto", "cpu") == "reference"
    assert "apt-get install g++" in str(backends.why_not("cpu", "cpu"))
    with pytest.raises(BackendError, match=r"cannot run here: no C\+\+17 compiler .* apt-get install g\+\+"):
        backends.resolve("cpu", "cpu")


def test_what_was_measured_here_wins_over_what_was_shipped(empty_tables: Path) -> None:
    shipped, mine = TuningTable("cpu", {KEY: {"a": 3e-5, "b": 2e-5}}), TuningTable("cpu", {KEY: {"a": 1e-5}})
    tuning_table.write(empty_tables / "shipped" / "cpu.json", shipped)
    assert tuning_table.times(PROBLEM) == {"a": 3e-5, "b": 2e-5}
    assert tuning_table.times(replace(PROBLEM, batch=8)) == {}  # three buckets away
    tuning_table.write(empty_tables / "mine" / "cpu.json", mine)
    assert tuning_table.times(PROBLEM) == {"a": 1e-5, "b": 2e-5}


def test_tables_survive_writing(empty_tables: Path) -> None:
    path = empty_tables / "deep" / "table.json"
    table = TuningTable("nvidia-h200", {str(PROBLEM): {"triton": 1.25e-6}})
    tuning_table.write(path, table)
    assert tuning_table.read(path) == table
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_a_failed_write_leaves_the_old_table(empty_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = empty_tables / "table.json"
    tuning_table.write(path, TuningTable("cpu", {"a": {"cpu": 1.0}}))

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        tuning_table.write(path, TuningTable("cpu", {"b": {"cpu": 2.0}}))
    assert tuning_table.read(path).rows == {"a": {"cpu": 1.0}}
    assert [p.name for p in empty_tables.iterdir()] == ["table.json"]


def test_merging_keeps_both_and_prefers_the_newer() -> None:
    old = TuningTable("cpu", {"a": {"cpu": 1.0, "reference": 2.0}, "b": {"cpu": 3.0}})
    merged = old.merged(TuningTable("cpu", {"a": {"cpu": 0.5}, "c": {"cpu": 4.0}}))
    assert merged.rows == {"a": {"cpu": 0.5, "reference": 2.0}, "b": {"cpu": 3.0}, "c": {"cpu": 4.0}}
    assert old.rows["a"] == {"cpu": 1.0, "reference": 2.0}
    with pytest.raises(FormatError, match="times belong to one device"):
        old.merged(TuningTable("nvidia-h200"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not a tuning table"),
        ("[]", "not a tuning table"),
        ('{"version": 2}', "not a tuning table"),
        ('{"version": 1, "device": "cpu", "rows": {}}', "has version 1"),
        ('{"version": 2, "device": "cpu", "rows": {"a": {"cpu": -1.0}}}', "times are positive"),
        ('{"version": 2, "device": "cpu", "rows": {"a": {"cpu": NaN}}}', "times are positive"),
        ('{"version": 2, "device": "cpu", "rows": {"a": [1]}}', "not a tuning table"),
    ],
)
def test_damaged_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        tuning_table.read(path)


def test_shipped_tables_are_readable() -> None:
    for path in tuning_table.SHIPPED.glob("*.json"):
        assert tuning_table.read(path).device == path.stem
        json.loads(path.read_text())


def test_slug() -> None:
    assert device_slug("cpu") == tuning_table.slug(cpu_name()) != ""
    assert device_slug("meta") == "meta"
    assert tuning_table.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
