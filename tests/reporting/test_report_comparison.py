"""Several runs side by side: the table, seeds, the frontier, published marks, one page that needs no other file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report_page import PLAN, fill

from lbs.cli import main
from lbs.config import FinetuneRun, SearchRun
from lbs.reporting import comparison, page, pareto
from lbs.reporting.gathered import line_of
from lbs.reporting.published import MARKS, marks_of
from lbs.reporting.records import read
from lbs.reporting.units import bops
from lbs.run_folder import RunFolder, read_json, write_json
from lbs_kernels.errors import CheckpointError


def make_run(folder: Path, seed: int, accuracy: float, search: dict[str, Any] | None = None, **made: Any) -> Path:
    """A finished run of a row of CIFAR-100 ResNet-20. search: options of the search that differ from their defaults."""
    run = RunFolder(folder)
    fill(run, "plan", "metrics", "results")
    run.add_result("finetune", {**run.results()["finetune"], "accuracy": accuracy, "best_accuracy": accuracy + 0.01})
    searched = SearchRun(**{"model": "cifar_resnet20", "data": "c.npz", "bops": 0.03, "seed": seed, **(search or {})})
    tuned = FinetuneRun(model="cifar_resnet20", data="elsewhere/c.npz", seed=seed, epochs=4)
    write_json(run.file("config.json"), {"search": searched.as_dict(), "finetune": tuned.as_dict()})
    write_json(run.file("network.json"), {"model": "cifar_resnet20", "num_classes": 100})
    if made:
        write_json(run.file("record.json"), made)
    return folder


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed but not rendered, which takes seconds."""
    monkeypatch.setattr(page, "svg", lambda figure: b"<svg/>")


def cells(text: str) -> list[str]:
    return [re.sub("<.*?>|\u200b", "", cell) for cell in re.findall(r"<td.*?</td>", text)]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, sketches: None) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    runs = [make_run(tmp_path / name / "joint", 0, accuracy) for name, accuracy in (("one", 0.671), ("two", 0.682))]
    assert [line.name for line in comparison.gather(runs).lines] == ["one/joint", "two/joint"]
    assert {"one/joint", "two/joint"} <= set(cells(comparison.compare(runs, tmp_path / "both").read_text()))


def test_two_runs_make_one_page_with_pictures(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0, accuracy) for name, accuracy in (("one", 0.671), ("two", 0.682))]
    path = comparison.compare(runs, tmp_path / "both")
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    for stem in ("pareto-cifar100-resnet20", "curves"):
        assert f'id="{stem}"' in text
        ElementTree.parse(tmp_path / "both" / f"{stem}.svg")
    found = cells(text)
    assert {"67.10 %", "68.20 %", "69.20 % (3)", "70.00 %", "50 of 50", "68.1 %", "630.6M", "HAQ"} <= set(found)
    assert all((tmp_path / name / "record.json").exists() is False for name in ("one", "two"))


@pytest.mark.usefixtures("sketches")
def test_seeds_of_one_row_are_summed_up(tmp_path: Path) -> None:
    made = {"row": "cifar100-resnet20", "network": "cifar100-resnet20", "schedule": "8+30 of 30+200 epochs"}
    runs = [make_run(tmp_path / f"s{seed}", seed, 0.66 + 0.01 * seed, **(made if seed else {})) for seed in range(3)]
    runs.append(make_run(tmp_path / "longer", 4, 0.7, {"epochs": 31}, **made))
    lines = [line_of(read(run)) for run in runs]
    table = comparison.tables(lines)[2]
    assert table.rows[0][:5] == ("cifar100-resnet20", "0, 1, 2", "67.00 %", "66.00 % .. 68.00 %", "68.00 %")
    assert len(table.rows) == 1  # another schedule is another row, and has one seed only
    assert lines[0].bops == PLAN.bops()
    assert {line.network for line in lines} == {"cifar100-resnet20"}
    text = comparison.compare(runs, tmp_path / "all").read_text()
    assert "Rows with several seeds" in text


@pytest.mark.parametrize(
    ("change", "one_row"),
    [
        ({"bops": 0.04}, False),
        ({"size_mb": 0.1}, False),
        ({"mode": "greedy"}, False),
        ({"gate_lr": 0.02}, False),
        ({"exclude": ("fc",)}, False),
        ({"weights_digest": "other"}, False),
        ({"log_every": 3}, True),
        ({"milestones": (3,)}, True),  # the rate is constant
        ({"row": "some-row"}, True),
    ],
)
def test_runs_are_seeds_of_one_row_by_what_was_asked(tmp_path: Path, change: dict[str, Any], one_row: bool) -> None:
    runs = [make_run(tmp_path / "one", 0, 0.6), make_run(tmp_path / "two", 1, 0.7, change)]
    lines = [line_of(read(run)) for run in runs]
    assert len(comparison.tables(lines)[2].rows) == one_row
    if one_row:
        assert comparison.tables(lines)[2].rows[0][:2] == ("cifar100-resnet20 joint", "0, 1")


def test_an_option_an_older_release_did_not_have_counts_as_its_default(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "new", 0, 0.6), make_run(tmp_path / "old", 1, 0.7)]
    config = read_json(runs[1] / "config.json")
    del config["search"]["exclude"]
    write_json(runs[1] / "config.json", config)
    assert len({line_of(read(run)).asked for run in runs}) == 1


@pytest.mark.usefixtures("sketches")
def test_all_targets_and_the_seed_of_a_search_alone_are_listed(tmp_path: Path) -> None:
    run = RunFolder(make_run(tmp_path / "search-only", 5, 0.6))
    config = read_json(run.file("config.json"))
    write_json(run.file("config.json"), {"search": config["search"]})
    text = comparison.compare([run.path, make_run(tmp_path / "other", 0, 0.6)], tmp_path / "out").read_text()
    line = line_of(read(run.path))
    assert (line.seed, line.variant) == (5, "joint")
    shown = [line.of_targets(key) for key in ("target", "thresholds", "value")]
    assert shown == [f"{bops(n * PLAN.bops())}, {size}" for n, size in ((2, "5.5 kB"), (3, "5.3 kB"), (1, "5.4 kB"))]
    assert set(shown) <= set(cells(text))


@pytest.mark.usefixtures("sketches")
def test_a_run_that_lacks_phases_is_listed_with_dashes(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", 0, 0.6)
    started = RunFolder(tmp_path / "<b>started")
    started.path.mkdir()
    started.append_metrics({"phase": "search", "kind": "epoch", "step": 1, "epoch": 1, "loss": 1.0})
    text = comparison.compare([whole, started.path], tmp_path / "out").read_text()
    assert "<li>&lt;b&gt;started: in no picture: no accuracy was measured</li>" in text
    line = line_of(read(started.path))
    assert (line.last, line.bops, line.equal, line.schedule) == (None, None, "-", "-")


@pytest.mark.usefixtures("sketches")
def test_the_command_prints_every_target_and_gives_them_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / name, seed, 0.6)) for seed, name in enumerate(("one", "two"))]
    assert main.main(["report", *runs, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    allowed, before = (f"{bops(n * PLAN.bops())}, {size}" for n, size in ((2, "5.5 kB"), (3, "5.3 kB")))
    assert printed.err.count(f"(allowed {allowed}, thresholds reached {before})") == 2
    found = json.loads(printed.out)["runs"]
    assert [(line["seed"], line["targets"]["size_mb"]["thresholds"]) for line in found] == [(0, 5300), (1, 5300)]


def test_a_run_that_is_left_out_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sketches: None
) -> None:
    runs = [make_run(tmp_path / name, 0, 0.6) for name in ("good", "<i>broken")]
    (runs[1] / "results.json").write_text("{")
    paths = [str(path) for path in (*runs, tmp_path / "absent")]
    assert main.main(["report", *paths, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "left out: <i>broken: " in printed.err
    assert "left out: absent: no run folder" in printed.err
    assert set(json.loads(printed.out)["left_out"]) == {"<i>broken", "absent"}
    text = (tmp_path / "out/report.html").read_text()
    assert "<i>broken" not in text
    assert re.search(r"<li>&lt;i&gt;broken: .*results.json is not JSON", text)
    with pytest.raises(CheckpointError, match=r"no run can be read: no run folder.*; no run folder"):
        comparison.compare([tmp_path / "absent", tmp_path / "other"], tmp_path / "out")


def test_size_and_time_stand_beside_accuracy(tmp_path: Path, sketches: None) -> None:
    runs = [
        make_run(tmp_path / name, 0, accuracy) for name, accuracy in (("a", 0.6), ("b", 0.61), ("c", 0.62), ("d", 0.63))
    ]
    for run, device, milliseconds in zip(runs, ("x", "x", "y"), (3, 2, 1), strict=False):
        row = {"contender": "packed", "batch": 1, "median": 1e-3 * milliseconds, "p20": 1e-3, "p80": 1e-3}
        RunFolder(run).add_result("bench", {"device": device, "threads": 2, "rows": [row]})
    lines = comparison.gather(runs).lines
    table = comparison.tables(lines)[0]
    assert table.header[-2:] == ("#File", "#Time, batch 1")
    assert [row[-2:] for row in table.rows] == [("20.0 kB", t) for t in ("3.00 ms", "2.00 ms", "1.00 ms", "-")]
    assert "Times: x, 2 threads; y, 2 threads. Compare times of one machine only." in table.note
    pictures, notes = comparison.draw(lines, [])
    assert list(pictures) == [f"{stem}-cifar100-resnet20" for stem in ("pareto", "size", "time")]
    drawn = [line.get_label() for line in pictures["time-cifar100-resnet20"][1].axes[0].lines]
    assert {"a", "b"} <= set(drawn)
    assert not {"c", "d"} & set(drawn)
    assert (
        notes["time-cifar100-resnet20"] == "Not shown: c (timed on y, 2 threads); d (not timed at batch 1: lbs bench)."
    )
    assert notes["size-cifar100-resnet20"] == ""


def test_the_frontier_and_the_enlargement() -> None:
    marks = {mark: index for index, mark in enumerate(marks_of("cifar100-resnet20"))}
    points = [pareto.Point("a", 640e6, 67.0), pareto.Point("b", 630e6, 67.5), pareto.Point("c", 700e6, 68.0)]
    assert [point.name for point in pareto.frontier(points)] == ["b", "c"]
    near = pareto.crowd(points, marks)  # the published crowd near 650M is enlarged
    assert len(near) == 5  # without full precision and pruning only
    looks = []
    for shown in (marks, near):
        (axis,) = pareto.accuracy_over_cost(points, shown, "bit operations", bops).axes
        assert len(axis.lines) == len(shown) + 3 + 1
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("bit operations", "top-1 accuracy, %")
        looks.append({str(line.get_label()): line.get_marker() for line in axis.lines})
    assert all(looks[0][name] == marker for name, marker in looks[1].items() if "published" in name)
    assert pareto.crowd([*points, pareto.Point("d", 5e9, 69.0)], marks) == {}
    assert pareto.crowd(points, {}) == {}


def test_published_points_are_those_of_the_paper() -> None:
    assert len(MARKS) == 7 + 9 + 6 + 5
    assert all(60 < mark.top1 < 75 for mark in MARKS)
    assert min(mark.bops for mark in marks_of("imagenet-mobilenet_v2")) == pytest.approx(10.8e9)
