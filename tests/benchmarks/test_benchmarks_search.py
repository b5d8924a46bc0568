"""bench_search.py runs and writes the schema it promises."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_cost_of_searching_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts four processes for the peaks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench_search")
    path, threads = tmp_path / "result.json", torch.get_num_threads()
    line = f"--model digits_resnet8 --batch 32 --rounds 2 --device cpu --output {path}"
    monkeypatch.setattr(sys, "argv", ["bench_search", *line.split()])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    body = json.loads(path.read_text())
    assert (body["version"], body["level"], body["header"]["model"]) == (1, "training", "digits_resnet8")
    rows = {row["contender"]: row for row in body["rows"]}
    assert set(rows) == {*module.CONTENDERS, *module.PARTS}
    assert rows["float"]["slower_than_float"] == rows["float"]["memory_over_float"] == 1
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in rows.values())
    assert rows["float"]["epoch"] == pytest.approx(rows["float"]["median"] * (50_000 // 32))
    assert all(rows[name]["peak_bytes"] > 0 for name in module.CONTENDERS)
    table = importlib.import_module("readme_tables").training_table("results/device/search_digits_resnet8.json", body)
    assert len(table) == 4 + len(rows)
