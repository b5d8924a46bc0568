"""Every mode and every kind of target through the commands: searched, fine-tuned, recorded, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_nets
import pytest
import torch
from torch import Tensor

from lbs import run_folder
from lbs.cli import main
from lbs.config import FinetuneRun, SearchRun
from lbs.cost import latency
from lbs.plan import Plan
from lbs.run_folder import RunFolder
from lbs.runs import limits, network, rows
from lbs.runs.stages import pack_run
from lbs.train import checkpoint
from lbs.train.trainer import Trainer
from lbs_kernels.errors import GraphError, PlanError, TrainingError
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table

SMALL = rows.Network(
    "small",
    "tiny_modes:Net",
    common={"data": "digits", "augment": False, "batch_size": 64, "train_images": 192, "calibration": 64},
    float={"epochs": 1},
    search={"lr": 0.01, "log_every": 1, "max_pruning_ratio": 0.5, "group_size": 4},
    finetune={"lr": 0.02},
)
MODES = {"pruning-only": 0.6, "two-stage": 0.02, "multi-path": 0.03, "greedy": 0.02}
LINE = "--schedule 2+1 --threads 1"
Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the small network, its rows, and the run of each mode, never interrupted."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "tiny_modes.py").write_text(cli_nets.SOURCE)
    made = [rows._row(SMALL, mode, {"bops": bops, "mode": mode}, "") for mode, bops in MODES.items()]
    made.append(rows._evenly_pruned(SMALL, 4, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "ROWS", {row.name: row for row in made})
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for mode in MODES:
            assert main.main(f"reproduce small-{mode} --out {mode} {LINE}".split()) == 0
        yield folder


def digests(folder: Path) -> dict[str, str]:
    """Weights and plan a run ended with, and its rows without the clock."""
    names = ("float.safetensors", "searched.safetensors", "model.safetensors")
    found = {name: checkpoint.digest(checkpoint.load_weights(folder / name)) for name in names}
    metrics = run_folder.RunFolder(folder).metrics()
    found["metrics"] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in metrics])
    return {**found, "plan": (folder / "plan.json").read_text()}


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_every_mode(home: Path, mode: str) -> None:
    record, plan = json.loads((home / mode / "record.json").read_text()), Plan.load(home / mode / "plan.json")
    results = json.loads((home / mode / "results.json").read_text())
    assert record["bops"] == plan.bops() <= record["target_bops"] == MODES[mode] * plan.full_precision_bops()
    assert record["bops"] == results["search"]["targets"]["bops"]["value"] == results["finetune"]["bops"]
    assert [row["name"] for row in json.loads(plan.to_json())["layers"]] == ["stem", "conv1", "conv2", "fc"]
    # the files hold the network that was measured at the end of the search
    assert results["finetune"]["accuracy_before"] == results["search"]["frozen_accuracy"]
    if mode != "pruning-only":
        assert record["verified"]
        assert record["equal_predictions"] == record["images"] == 360
    pruned = any(layer.kept_filters < layer.filters for layer in plan.layers)
    assert pruned or mode not in ("pruning-only", "two-stage")


def test_uniform_bits_without_an_even_share_of_the_filters(home: Path) -> None:
    line = "reproduce small-uniform-4-pruned --out even --schedule 1 --threads 1 --finetune ranges=filter"
    assert main.main(line.split()) == 0
    record, plan = json.loads((home / "even/record.json").read_text()), Plan.load(home / "even/plan.json")
    assert record["verified"]
    assert record["bits"] == [[4, 4], [8, 8]]
    assert {layer.ranges for layer in plan.layers} == {"filter"}
    whole = {layer.name: layer.filters for layer in plan.layers}
    assert record["pruned_layers"] == {name: f"{whole[name] // 2}/{whole[name]}" for name in record["pruned_layers"]}
    assert record["pruned_layers"].keys() == {layer.name for layer in plan.layers if layer.kept_filters < layer.filters}
    assert record["pruned_layers"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uniform_pruned": 0.25}, r"uniform_pruned=0.25; it is a share of filters in \[0, 1\), beside uniform bits"),
        ({"uniform_pruned": 1.0, "uniform": (4, 4)}, "uniform_pruned=1; it is a share"),
    ],
)
def test_shares_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        FinetuneRun(**options)


def test_a_network_that_was_only_pruned_stays_in_float(home: Path, lbs_command: Command) -> None:
    record = json.loads((home / "pruning-only/record.json").read_text())
    assert record["in_float"]
    assert record["bits"] == [[32, 32]]
    assert record["verified"] is record["packed_top1"] is record["bytes"] is None
    model, card = network.load_network(RunFolder(home / "pruning-only", {"tiny_modes:Net"}))
    assert type(model.get_submodule("conv1")) is torch.nn.Conv2d
    assert model(card.example()).shape == (1, 10)
    assert not (home / "pruning-only/packed.lbs.safetensors").exists()
    with pytest.raises(GraphError, match=r"holds a float network: .* There is nothing to pack"):
        pack_run(RunFolder(home / "pruning-only", {"tiny_modes:Net"}))
    assert lbs_command("report pruning-only")[0] == 0


def test_two_stages_prune_in_float_before_bits(home: Path) -> None:
    phases = list(dict.fromkeys(row["phase"] for row in run_folder.RunFolder(home / "two-stage").metrics()))
    assert phases == ["float", "prune", "pruned", "search", "finetune"]
    plan = Plan.load(home / "two-stage/plan.json")
    pruned = replace(plan, layers=tuple(replace(layer, w_bits=32, a_bits=32) for layer in plan.layers))
    assert pruned.bops() <= 0.7 * plan.full_precision_bops()
    search = json.loads((home / "two-stage/results.json").read_text())["search"]
    assert list(search["phases"]) == phases[1:4]
    assert search["seconds"] == pytest.approx(sum(phase["seconds"] for phase in search["phases"].values()))


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """End the run at its n-th training step."""
    inner, left = Trainer._train_step, [step]

    def train_step(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        inner(trainer, images, labels)

    patch.setattr(Trainer, "_train_step", train_step)


# 3 steps an epoch: float 3, then 6 of each phase of the search, fewer where the budget is met before.
KILLS = [("two-stage", 7), ("two-stage", 13), ("two-stage", 17), ("pruning-only", 7), ("greedy", 4), ("multi-path", 7)]


@pytest.mark.parametrize(
    ("mode", "step"),
    [pytest.param(*kill, marks=() if kill[1] in (13, 4) else (pytest.mark.slow,)) for kill in KILLS],
)
def test_killed_it_goes_on_to_the_same_bits(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch, mode: str, step: int, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        assert lbs_command(f"reproduce small-{mode} --out {tmp_path}/run {LINE}")[0] == 130
    code, _, errors = lbs_command(f"reproduce small-{mode} --out {tmp_path}/run --resume --threads 1")
    assert code == 0, errors
    assert digests(tmp_path / "run") == digests(home / mode)


SEARCH = (
    "search --data digits --model tiny_modes:Net --no-augment --batch-size 64 --train-images 128 --calibration 64 "
    "--epochs 1 --weights greedy/float.safetensors --threads 1"
)


AROUND = 1e-5  # seconds of a call beside its layers


def times(problem: Problem, threads: int | None = None) -> float | None:
    """A table that knows every number of filters: a microsecond per filter and weight bit."""
    return 1e-6 * problem.out_channels * problem.w_bits


def measured(patch: pytest.MonkeyPatch, estimate: Callable[..., float | None]) -> None:
    """A machine on which layers take what `estimate` says, and calls were measured."""
    patch.setattr(table, "estimate", estimate)
    patch.setattr(latency, "surroundings", lambda layers, **options: {1: latency.Around({(8, 8): AROUND}, 1e-3, 2)})


def test_bytes_and_milliseconds_are_targets_too(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, times)
    line = f"{SEARCH} --run sized --size-mb 0.0055 --latency-ms 0.29 --filter-tile 8 --group-size 4"
    code, section, errors = lbs_command(line)
    assert code == 0, errors
    targets, plan = section["targets"], Plan.load(home / "sized/plan.json")
    assert set(targets) == {"size_mb", "latency_ms"}
    assert targets["size_mb"]["value"] <= targets["size_mb"]["target"] == 5500
    assert targets["latency_ms"]["value"] <= targets["latency_ms"]["target"] == pytest.approx(0.29e-3)
    by_hand = AROUND + sum(1e-6 * layer.kept_filters * layer.w_bits for layer in plan.layers)
    assert targets["latency_ms"]["value"] == pytest.approx(by_hand)
    assert section["target_bops"] is None
    assert all(layer.kept_filters % 8 == 0 for layer in plan.layers[:-1])
    code, packed, _ = lbs_command("pack --run sized --model tiny_modes:Net")
    assert code == 0
    took = packed["latency"]
    assert (took["target"], took["threads"]) == (pytest.approx(0.29e-3), 1)
    assert took["estimated"] == pytest.approx(by_hand)
    assert took["measured"] > 0
    config = home / "sized/config.json"
    known = config.read_text()
    config.write_text(known.replace('"latency_ms": 0.29', '"latency_ms": "0.29"'))
    code, body, _ = lbs_command("pack --run sized --model tiny_modes:Net")
    config.write_text(known)
    assert code == 2
    assert "config.json, section search: latency_ms is '0.29' and latency_device 'cpu'" in body["error"]


def test_two_stages_count_calls_of_the_whole_network(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage searches a network that has lost filters, of which no call was ever measured."""
    whole = [layer.in_channels for layer in Plan.load(home / "greedy/plan.json").layers]
    measured(monkeypatch, times)
    known = latency.surroundings
    monkeypatch.setattr(
        latency,
        "surroundings",
        lambda layers, **options: known(layers) if [layer.in_channels for layer in layers] == whole else {},
    )
    code, section, errors = lbs_command(f"{SEARCH} --run staged --mode two-stage --prune-bops 0.7 --latency-ms 0.25")
    assert code == 0, errors
    plan = Plan.load(home / "staged/plan.json")
    assert [plan.kept_inputs(layer) for layer in plan.layers] != whole
    by_hand = AROUND + sum(1e-6 * layer.kept_filters * layer.w_bits for layer in plan.layers)
    assert section["targets"]["latency_ms"]["value"] == pytest.approx(by_hand)


def test_two_stages_and_greedy_search_by_modelled_times(home: Path, lbs_command: Command) -> None:
    device = "--latency-device modelled:nvidia-h200:128"
    for mode in ("two-stage --prune-bops 0.7", "greedy"):
        name = f"modelled-{mode.partition(' ')[0]}"
        code, section, errors = lbs_command(f"{SEARCH} --run {name} --mode {mode} --latency-ms 1 {device}")
        assert code == 0, errors
        assert section["targets"]["latency_ms"]["modelled"] == "modelled, nvidia-h200, batch 128"
        assert Plan.load(home / name / "plan.json").modelled == "modelled, nvidia-h200, batch 128"


@pytest.fixture
def no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing was measured."""
    monkeypatch.setattr(table, "load", table.TuningTable)


def test_a_latency_nobody_measured_names_the_way_out(home: Path, lbs_command: Command, no_times: None) -> None:
    code, body, _ = lbs_command(f"{SEARCH} --run unmeasured --latency-ms 1")
    assert code == 2
    way = "lbs tune --shapes tiny_modes:Net --input-shape 1,8,8 --classes 10 --device cpu"
    assert (
        f"is known on this machine, so not what surrounds its steps; measure layers and calls first, with {way}"
        in (body["error"])
    )
    untrained = SEARCH.replace("--weights greedy/float.safetensors", "--float-epochs 1")
    code, body, _ = lbs_command(f"{untrained} --run unmeasured --latency-ms 1")
    assert "measure layers and calls first" in body["error"]
    assert not (home / "unmeasured/checkpoints").exists()
    assert lbs_command(f"{SEARCH} --run aimless")[1]["error"].startswith("no budget; name one or several: --bops")


def test_a_width_nobody_measured_is_told_before_the_float_network_is_trained(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, lambda problem, threads: None if problem.w_bits == 4 else times(problem))
    untrained = SEARCH.replace("--weights greedy/float.safetensors", "--float-epochs 1")
    code, body, _ = lbs_command(f"{untrained} --run partial --latency-ms 1")
    assert code == 2
    assert "_w4a" in body["error"]
    assert "measure the layers first, with lbs tune --shapes tiny_modes:Net --input-shape 1,8,8" in body["error"]
    assert not (home / "partial/checkpoints").exists()


def test_every_target_counts_when_a_run_is_looked_at() -> None:
    met = {"target": 2.0, "value": 2.0}
    assert limits.targets_met({"targets": {"bops": met, "size_mb": met}})
    assert not limits.targets_met({"targets": {"bops": met, "size_mb": {"target": 2.0, "value": 2.1}}})
    assert limits.targets_met({})  # a phase without a budget
    with pytest.raises(PlanError, match="no budget"):
        limits.limits(SearchRun())
