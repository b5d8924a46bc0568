"""bench_milliseconds.py trains what is missing, times what is there, and writes the schema it promises."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lbs_kernels.times import table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_milliseconds")


def test_contenders_share_a_recipe_and_have_folders_of_their_own(module: Any) -> None:
    found = module.contenders("cifar100-resnet20", [0.1, 0.08], 8, ("gate_lr=0.01",))
    assert [one.row.removeprefix("cifar100-resnet20") for one in found] == [
        *("-uniform-8", "-uniform-4", "-uniform-8-pruned", "-uniform-8-pruned"),
        *("-uniform-4-pruned", "-uniform-4-pruned", "", "-greedy", "", "-greedy"),
    ]
    assert [one.asked for one in found] == [None] * 6 + [0.1, 0.1, 0.08, 0.08]
    assert len({one.folder(Path("runs"), seed) for one in found for seed in (0, 1)}) == 2 * len(found)
    assert all("ranges=filter" in one.options for one in found)
    assert ["gate_lr=0.01" in one.options for one in found] == [False] * 6 + [True] * 4


@pytest.mark.slow
def test_what_is_done_is_not_done_again(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains eight networks in processes of their own, after measuring layers."""
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path / "tuning"))
    table.forget()
    path, threads = tmp_path / "result.json", torch.get_num_threads()
    line = f"--row digits-resnet8 --data digits --runs {tmp_path / 'runs'} --batches 1 2 --rounds 3 --output {path}"
    options = "--float-epochs 1 --schedule 1+1 --train-images 256"
    argv = ["bench_milliseconds", *line.split(), f"--options={options}", "--points", "1", "0.01"]
    monkeypatch.setattr(sys, "argv", argv)
    calls: list[tuple[str, ...]] = []
    inner = module.command

    def command(*words: str) -> None:
        calls.append(words)
        inner(*words, *(("--points", "1") if words[0] == "tune" else ()))  # whole layers alone: seconds, not minutes

    monkeypatch.setattr(module, "command", command)
    try:
        module.main()
        first = json.loads(path.read_text())
        trained = [words for words in calls if words[0] == "reproduce"]
        calls.clear()
        module.main()
    finally:
        torch.set_num_threads(threads)
        table.forget()
    body = json.loads(path.read_text())
    assert (body["version"], body["level"], body["header"]["row"]) == (1, "milliseconds", "digits-resnet8")
    assert len(trained) == 10
    again = [words for words in calls if words[0] == "reproduce"]
    assert len(again) == len(body["missing"]) == 2  # out of reach: asked again, refused again
    rows = body["rows"]
    assert [{**row, **dict.fromkeys(("median", "p20", "p80", "fastest"))} for row in rows] == [
        {**row, **dict.fromkeys(("median", "p20", "p80", "fastest"))} for row in first["rows"]
    ]
    assert len(rows) == 2 * 9  # batches x (uniform 8, 4, four pruned, two searched, one not trained)
    assert all(0 < row["fastest"] <= row["p20"] <= row["median"] <= row["p80"] for row in rows)
    asked = [row for row in rows if row["asked"] is not None]
    assert len(asked) == 4
    assert all(row["estimated"] <= 1.1 * row["asked"] for row in asked)
    assert next(row for row in rows if row["contender"] == module.UNTRAINED)["bits"] == [[8, 8]]
