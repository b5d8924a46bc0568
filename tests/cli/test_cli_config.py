"""Configurations of runs: hash, round trip, and what a resumed run refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbs.config import FinetuneRun, SearchRun, from_dict, open_run, refuse_changes
from lbs.run_folder import RunFolder, read_json, write_json
from lbs_kernels.errors import CheckpointError, TrainingError

CONFIG = SearchRun(data="digits", model="m", bops=0.03, mean=(0.5,), std=(0.2,), milestones=(3, 5))


def test_json_round_trip_and_hash() -> None:
    body = json.loads(json.dumps(CONFIG.as_dict()))
    assert from_dict(SearchRun, body, "config.json") == CONFIG
    assert replace(CONFIG, lr=0.5).digest() != CONFIG.digest() == replace(CONFIG).digest()
    assert FinetuneRun().digest() != SearchRun().digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wings": 2}, "another release .wings."),
        ({"lr": None}, "another release .no lr."),
        ({"lr": 0.25}, "edited by hand"),
    ],
)
def test_files_of_other_releases_and_edited_ones_are_refused(change: dict[str, Any], message: str) -> None:
    body = {**CONFIG.as_dict(), **change}
    if change.get("lr", 1) is None:
        del body["lr"]
    with pytest.raises(TrainingError, match=message):
        from_dict(SearchRun, body, "config.json")


def test_every_changed_option_is_named() -> None:
    tuning = FinetuneRun(data="digits", model="m")
    refuse_changes([(CONFIG, {"bops": 0.03, "model": "m"}), (tuning, {"model": "m"})], "config.json")
    message = r"search has bits \(2, 4, 8\), asked is \(2, 4\); .*lr 0.001, asked is 0.5; finetune has epochs 200, .* 3"
    with pytest.raises(TrainingError, match=message):
        refuse_changes([(CONFIG, {"lr": 0.5, "bits": (2, 4), "bops": 0.03}), (tuning, {"epochs": 3})], "config.json")
    with pytest.raises(TrainingError, match="unknown options wings"):
        refuse_changes([(CONFIG, {"wings": 2})], "config.json")


def test_open_run_starts_resumes_and_protects(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    asked = {"data": "digits", "model": "m", "bops": 0.03, "seed": 4}
    with pytest.raises(TrainingError, match="no search to resume"):
        open_run(SearchRun, folder, asked, resume=True)
    with pytest.raises(TrainingError, match="no model= is given"):
        open_run(SearchRun, folder, {"data": "digits"}, resume=False)
    started = open_run(SearchRun, folder, asked, resume=False)
    assert open_run(SearchRun, folder, {}, resume=True) == started
    assert open_run(SearchRun, folder, {**asked, "seed": 5}, resume=False).seed == 5  # nothing was trained yet
    folder.checkpoint("search").parent.mkdir()
    folder.checkpoint("search").write_bytes(b"x")
    with pytest.raises(TrainingError, match="already holds a search; go on with resume=True"):
        open_run(SearchRun, folder, asked, resume=False)
    with pytest.raises(TrainingError, match="seed 5, asked is 4"):
        open_run(SearchRun, folder, asked, resume=True)
    tuned = open_run(FinetuneRun, folder, {"epochs": 2}, resume=False, inherit="search")
    assert (tuned.data, tuned.model, tuned.epochs, tuned.seed) == ("digits", "m", 2, 0)
    assert read_json(folder.file("config.json")).keys() == {"version", "processes", "search", "finetune"}


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    asked = {"data": "digits", "model": "m", "bops": 0.03}
    started = open_run(SearchRun, folder, asked, resume=False, processes=2)
    assert open_run(SearchRun, folder, {}, resume=True, processes=2) == started
    with pytest.raises(TrainingError, match=r"resume=True with 1 processes; the search in .* was begun with 2"):
        open_run(SearchRun, folder, {}, resume=True)
    open_run(FinetuneRun, folder, {}, resume=False, inherit="search")  # another command may go on with one
    assert read_json(folder.file("config.json"))["processes"] == {"search": 2, "finetune": 1}


def test_a_teacher_has_a_name_weights_and_something_to_teach() -> None:
    with pytest.raises(TrainingError, match="give the name of a network and the file"):
        FinetuneRun(teacher="cifar_resnet56", distill=0.5)
    with pytest.raises(TrainingError, match="is not used at distill=0"):
        FinetuneRun(teacher="cifar_resnet56", teacher_weights="a.pth")


def test_damaged_files_name_the_way_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.file("config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_run(SearchRun, folder, {}, resume=True)
    for text in ("[1]", "3"):
        folder.file("config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json holds a JSON .*, no object; restore it"):
            open_run(SearchRun, folder, {}, resume=True)
    folder.file("config.json").write_text('{"search": 3}')
    with pytest.raises(CheckpointError, match="section 'search' is a int, no object"):
        open_run(SearchRun, folder, {}, resume=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(folder.file("x.json"), {"loss": float("nan")})
    assert not folder.file("x.json").exists()
