"""A run from the shell: search, fine-tune, pack, verify, bench, report; kills, resumption and bad input on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_nets
import pytest
import torch

import lbs
from lbs.cli import main, quickstart
from lbs.plan import Plan
from lbs.reporting import records, tables
from lbs.reporting.page import report
from lbs.reporting.units import bops
from lbs.run_folder import RunFolder
from lbs.runs import stages
from lbs.train import checkpoint
from lbs.train.trainer import Trainer
from lbs_kernels import extension
from lbs_kernels.errors import DataError

NETWORK = (
    cli_nets.SOURCE
    + """
def fails(classes):
    raise ValueError("no such size")

class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return super().forward(x)
"""
)
SEARCH = "--data digits --model tiny_cli_net:Net --no-augment --batch-size 64 --float-epochs 2 --epochs 2 --bops 0.03"
SEARCH += " --log-every 5 --threads 1 --lr 0.01 --calibration 128"
OWN = "--model tiny_cli_net:Net"
BENCH = "--batches 1,3 --rounds 3 --threads 1 --baselines float32,uniform8"
FINETUNE = "--epochs 2 --batch-size 64 --lr 0.02 --threads 1 --distill 0.3 --calibration 128"
Command = Callable[..., tuple[int, Any, str]]
PICTURES = ("accuracy", "bits", "bytes", "filters", "gates-activations", "gates-cost", "gates-filters", "gates-weights")
PICTURES += ("latency-1", "latency-3", "loss", "milliseconds", "operations", "top1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network and a run that was searched and fine-tuned."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny_cli_net.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        assert main.main(f"search --run whole {SEARCH}".split()) == 0
        assert main.main(f"finetune --run whole {FINETUNE} {OWN}".split()) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))


def test_the_road_from_search_to_report(home: Path, lbs_command: Command) -> None:
    run = home / "whole"
    results = json.loads((run / "results.json").read_text())
    plan = Plan.load(run / "plan.json")
    assert plan.bops() == results["finetune"]["bops"] <= results["search"]["target_bops"]
    assert results["search"]["target_bops"] == 0.03 * plan.full_precision_bops()
    code, packed, _ = lbs_command(f"pack --run whole {OWN}")
    assert code == 0
    assert packed["bytes"] == (run / packed["file"]).stat().st_size
    code, verified, _ = lbs_command(f"verify --run whole --images 40 --strict {OWN}")
    assert code == 0
    assert verified["equal_predictions"] == verified["identical_outputs"] == verified["images"] == 360
    assert verified["packed_accuracy"] == results["finetune"]["accuracy"] > 0.5
    code, explained, _ = lbs_command("explain --run whole --batch 2")
    assert code == 0
    assert [row["name"] for row in explained["rows"] if row["w_bits"]] == [layer.name for layer in plan.layers]
    code, timed, _ = lbs_command(f"bench --run whole {BENCH} {OWN}")
    assert code == 0
    assert {(row["contender"], row["batch"]) for row in timed["rows"]} == {
        (name, batch) for name in ("packed", "torch float32", "packed uniform 8-bit") for batch in (1, 3)
    }
    assert timed["images"] == 360  # of the run's own data
    assert timed["accuracy"]["packed"] == verified["packed_accuracy"]
    assert timed["accuracy"]["torch float32"] == results["float"]["accuracy"]
    code, written, _ = lbs_command("report whole")
    assert code == 0
    assert (written["pictures"], Path(written["page"]).name) == (
        [f"{stem}.svg" for stem in PICTURES],
        "report.html",
    )
    code, alone, _ = lbs_command(f"explain {run / packed['file']}")
    assert [row["kept_filters"] for row in alone["rows"]] == [row["kept_filters"] for row in explained["rows"]]


def test_a_run_whose_images_are_gone_is_timed_all_the_same(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(card: object) -> None:
        raise DataError("no data set at images.npz")

    shutil.copytree(home / "whole", home / "imageless")
    assert lbs_command(f"pack --run imageless {OWN}")[0] == 0
    monkeypatch.setattr("lbs.runs.network.images_of", gone)
    code, timed, told = lbs_command(f"bench --run imageless {BENCH} {OWN}")
    assert code == 0
    assert "images of random numbers, and no accuracies: no data set at images.npz" in told
    assert (timed["images"], timed["accuracy"]) == (0, {})


def test_streams_of_8_bits_go_through_all_of_it(home: Path, lbs_command: Command) -> None:
    search = SEARCH.replace("tiny_cli_net:Net", "digits_resnet8").replace("--epochs 2 ", "--epochs 1 ")
    assert lbs_command(f"search --run coded {search} --streams 8")[0] == 0
    code, _, told = lbs_command(f"finetune --run coded {FINETUNE} --streams 32")
    assert code != 0
    assert "streams 8, asked is 32" in told
    assert lbs_command(f"finetune --run coded {FINETUNE}")[0] == 0
    code, packed, _ = lbs_command("pack --run coded")
    assert len(packed["coded_streams"]) > 1
    code, verified, _ = lbs_command("verify --run coded --images 40 --strict")
    assert verified["equal_predictions"] == verified["identical_outputs"] == verified["images"] == 360
    code, explained, _ = lbs_command("explain --run coded")
    assert any("residual streams of 8 bits" in note for note in explained["notes"])
    assert lbs_command("bench --run coded --batches 1 --rounds 2 --threads 1 --baselines float32")[0] == 0
    assert lbs_command("report coded")[0] == 0
    assert f"{len(packed['coded_streams'])} residual streams of 8 bits" in (home / "coded" / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "kill", "often"),
    [("search", 9, False), ("search", 30, False), ("search", 60, True), ("finetune", 30, True)],
)
def test_a_killed_command_goes_on_to_the_same_bits(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch, command: str, kill: int, often: bool
) -> None:
    """Killed inside the first float epoch (no checkpoint yet), between and inside later ones.

    often: with a checkpoint after every step, so that it goes on in the middle of an epoch.
    """
    run = f"killed-{command}-{kill}"
    if command == "finetune":
        shutil.copytree(home / "whole", home / run, ignore=shutil.ignore_patterns("finetune*", "model.safetensors"))
    step, left, taken, build = Trainer._train_step, [kill], [0], Trainer.__init__

    def counted(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        taken[0] += self.phase == command
        step(self, images, labels)

    def often_saved(self: Trainer, model: Any, train: Any, recipe: Any, **options: Any) -> None:
        build(self, model, train, replace(recipe, checkpoint_seconds=0.0), **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", counted)
        if often:
            patch.setattr(Trainer, "__init__", often_saved)
        options = SEARCH if command == "search" else FINETUNE
        code, _, errors = lbs_command(f"{command} --run {run} {options} {OWN}")
        assert code == 130
        assert f"go on with lbs {command} --run {run} --resume" in errors
    left[0] = 10**9
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", counted)
        code, section, errors = lbs_command(f"{command} --run {run} --resume {OWN}")
    assert code == 0, errors
    assert not often or taken[0] == section["steps"]  # none twice
    name = "searched.safetensors" if command == "search" else "model.safetensors"
    again, expected = (checkpoint.load_weights(home / folder / name) for folder in (run, "whole"))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    if command == "search":
        assert (home / run / "plan.json").read_text() == (home / "whole/plan.json").read_text()


def test_a_run_is_not_resumed_with_another_configuration(home: Path, lbs_command: Command) -> None:
    before = (home / "whole/checkpoints/search.safetensors").read_bytes()
    code, body, errors = lbs_command("search --run whole --resume --lr 0.5 --bits 2,4")
    assert code == 2
    assert "bits (2, 4, 8), asked is (2, 4); lr 0.01, asked is 0.5" in body["error"]
    assert body["error"] in errors
    code, body, _ = lbs_command(f"search --run whole {SEARCH}")
    assert (code, body["kind"]) == (2, "TrainingError")
    assert "already holds a search" in body["error"]
    assert (home / "whole/checkpoints/search.safetensors").read_bytes() == before
    code, body, _ = lbs_command("finetune --run nothing --resume")
    assert "no finetune to resume" in body["error"]


def test_resuming_what_is_finished_changes_nothing(home: Path, lbs_command: Command) -> None:
    shutil.copytree(home / "whole", home / "again")
    rows = (home / "again/metrics.jsonl").read_text()
    code, section, _ = lbs_command(f"search --run again --resume {OWN}")
    assert code == 0
    assert section["steps"] == json.loads((home / "whole/results.json").read_text())["search"]["steps"]
    assert (home / "again/metrics.jsonl").read_text() == rows
    for name in ("searched.safetensors", "plan.json"):
        assert (home / "again" / name).read_bytes() == (home / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search --run bad --data nowhere.npz --model digits_resnet8 --bops 0.03", "no data set at nowhere.npz"),
        ("search --run bad --data digits --model resnet9000 --bops 0.03 --float-epochs 1", "no model is called"),
        ("search --run bad --data digits --model tiny_cli_net:Nut --bops 0.03 --float-epochs 1", "tiny_cli_net:Nut"),
        ("search --run bad --data digits --model digits_resnet8 --float-epochs 1", "no budget; name one"),
        (
            "search --run bad --data digits --model digits_resnet8 --float-epochs 1 --bops 0.1 --latency-device cuda",
            "--latency-device cuda says whose times a budget of milliseconds counts, and there is none; give",
        ),
        ("search --run bad --data digits --model digits_resnet8 --bops 0.03", "no float weights to start from"),
        ("search --run bad --data digits --model digits_resnet8 --bops 0.03 --weights none.pth", "none.pth"),
        ("search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --bits 2,3", "bit chain"),
        ("search --run bad --data digits --model digits_resnet8 --bops 0.0001 --weights w.pth", "out of reach"),
        (
            "search --run bad --data digits --model digits_resnet8 --bops 0.0001 --float-epochs 9",
            "M BOPs is out of reach; the gates reach ",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --float-epochs 9 --mode two-stage "
            "--prune-bops 0.1",
            "out of reach",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --float-epochs 9 --exclude conv9*",
            "--exclude 'conv9*' matches no layer",
        ),
        (
            "search --run bad --data digits --model tiny_cli_net:Net --bops 0.03 --weights w.pth",
            "does not fit the model",
        ),
        (
            "search --run bad --data digits --model cifar_resnet20 --bops 0.03 --float-epochs 9",
            "cifar_resnet20 fails on an image (1, 8, 8) of digits",
        ),
        (
            "finetune --run bad --data digits --model cifar_resnet20 --uniform 4,4 --weights w.pth",
            "cifar_resnet20 fails on an image",
        ),
        (
            "search --run bad --data digits --model torch.nn:Identity --bops 0.03 --float-epochs 9",
            "gives (1, 1, 8, 8) for one image of digits; a classifier gives (1, 10)",
        ),
        (
            "search --run bad --data digits --model tiny_cli_net:fails --bops 0.03 --float-epochs 9",
            "ValueError: no such",
        ),
        ("search --run bad --data digits --model : --bops 0.03 --float-epochs 9", "give module:function"),
        ("search --run bad --data digits --model digits_resnet8 --bops .03 --float-epochs 9 --bits 2,3", "bit chain"),
        ("search --run bad --data digits --model digits_resnet8 --bops .03 --float-epochs 9 --lr 0", "--lr 0.0"),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --float-epochs 9 --float-lr 0",
            "--float-lr 0",
        ),
        ("search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --batch-size 0", "1..1437"),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --calibration 0",
            "--calibration 0",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --device meta",
            "cpu or cuda",
        ),
        ("search --run w.pth --data digits --model digits_resnet8 --bops .03 --weights w.pth", "could not be written"),
        (
            "search --run bad --data digits --model tiny_cli_net:Branching --bops 0.03 --weights n.pth",
            "tiny_cli_net.py",
        ),
        ("search --run bad --data digits --model digits_resnet8 --bops 0.03 --weights nan.pth", "NaN or infinite"),
        (
            "search --run bad --data digits --model digits_resnet8 --bops 0.03 --weights w.pth --device gpu9",
            "no device",
        ),
        ("finetune --run bad --data digits --model digits_resnet8", "no searched network"),
        ("finetune --run bad --data digits --model digits_resnet8 --uniform 4", "give two widths"),
        ("finetune --run bad --data digits --model digits_resnet8 --weights w.pth --plan whole/plan.json", "plan"),
        ("finetune --run bad --data digits --model digits_resnet8 --uniform 4,4 --weights w.pth --lr 0", "--lr 0.0"),
        (
            "finetune --run bad --data digits --model digits_resnet8 --weights w.pth --uniform 4,4 --plan w.pth",
            "both name the bits",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --gate-lr -1",
            "--gate-lr -1",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --mode two-stage "
            "--pruned-lr 0",
            "between the stages: --pruned-lr 0.0; it must be above 0",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .03 --weights w.pth --mode two-stage "
            "--no-pruning",
            "--mode two-stage takes pruning=True, asked is False; leave one of them out",
        ),
        (
            "search --run bad --data digits --model digits_resnet8 --bops .9 --weights w.pth --mode pruning-only "
            "--bits 2,4",
            "--mode pruning-only takes --bits 32, asked is (2, 4)",
        ),
        ("quickstart --run bad --threads 0", "--threads 0"),
        ("pack --run bad", "network.json"),
        ("verify --run whole/checkpoints", "network.json"),
        ("verify --run whole --images 0", "0 images to compare"),
        ("explain --run whole --zoo x", "name one packed network"),
        ("explain whole/config.json", "config.json"),
        ("bench --zoo imagenet", "the zoo has no network"),
        ("report nowhere", "no run folder"),
    ],
)
def test_bad_input_is_one_clear_line(home: Path, lbs_command: Command, line: str, message: str) -> None:
    import lbs.models

    if not (home / "w.pth").exists():
        state = lbs.models.create("digits_resnet8").state_dict()
        torch.save(state, home / "w.pth")
        state["fc.weight"][0, 0] = float("nan")
        torch.save(state, home / "nan.pth")
        shutil.copy(home / "whole/float.safetensors", home / "n.safetensors")
        torch.save(checkpoint.load_weights(home / "n.safetensors"), home / "n.pth")
    shutil.rmtree(home / "bad", ignore_errors=True)
    code, body, errors = lbs_command(line)
    assert code == 2, errors
    assert message in body["error"], body["error"]
    assert errors.rstrip("\n").split("\n")[-1] == f"lbs {line.split()[0]}: {body['error']}"
    assert not (home / "bad/checkpoints").exists()


def test_a_search_of_no_epochs_is_projected(home: Path, lbs_command: Command) -> None:
    code, section, errors = lbs_command(
        f"search --run zero {SEARCH} --epochs 0 --float-epochs 0 --weights whole/float.safetensors"
    )
    assert code == 0, errors
    assert section["bops"] <= section["target_bops"]
    assert json.loads((home / "zero/results.json").read_text())["search"]["loss"] is None
    assert lbs_command(f"pack --run zero {OWN}")[0] == 0


def test_layers_stay_in_float_by_name(home: Path, lbs_command: Command) -> None:
    line = f"search --run partly {SEARCH} --epochs 1 --float-epochs 0 --weights whole/float.safetensors"
    code, section, errors = lbs_command(f"{line} --bops 0.06 --exclude conv1 --exclude con?1*")
    assert code == 0, errors
    assert ["conv1", "left in float: excluded by name"] in section["conversion"]
    assert json.loads((home / "partly/config.json").read_text())["search"]["exclude"] == ["conv1", "con?1*"]
    code, body, _ = lbs_command("search --run partly --resume --exclude fc")
    assert "exclude ('conv1', 'con?1*'), asked is ('fc',)" in body["error"]
    code, again, errors = lbs_command(f"search --run partly --resume {OWN}")
    assert (code, again["conversion"]) == (0, section["conversion"]), errors
    code, _, errors = lbs_command(f"finetune --run partly {FINETUNE} --epochs 1 {OWN}")
    assert code == 0, errors
    assert [layer.name for layer in Plan.load(home / "partly/plan.json").layers] == ["stem", "conv2", "fc"]
    results, page = RunFolder("partly").results(), tables.tiles(records.read("partly"))
    assert results["finetune"]["float_bops"] == section["float_bops"] > section["bops"]  # 32 x 32 bits each
    assert any(f"; layers left in float {bops(section['float_bops'])} more" in tile.detail for tile in page)
    code, packed, errors = lbs_command(f"pack --run partly {OWN}")
    assert code == 0, errors
    assert [name for name, _ in packed["kept_float"]] == ["conv1"]
    assert lbs_command(f"verify --run partly --images 8 {OWN}")[0] == 0
    # The same plan in a folder of its own, and uniform bits: both need the patterns again.
    own = f"finetune --data digits --model tiny_cli_net:Net --weights whole/float.safetensors {FINETUNE} --epochs 1"
    for run, options in (("planned", "--plan partly/plan.json"), ("even", "--uniform 4,4")):
        code, _, errors = lbs_command(f"{own} --run {run} {options} --exclude con?1*")
        assert code == 0, errors
        assert [layer.name for layer in Plan.load(home / run / "plan.json").layers] == ["stem", "conv2", "fc"]


def test_a_packed_file_that_is_not_the_trained_network_fails(home: Path, lbs_command: Command) -> None:
    shutil.copytree(home / "whole", home / "forged")
    assert lbs_command(f"pack --run forged {OWN}")[0] == 0
    weights = checkpoint.load_weights(home / "forged/model.safetensors")
    weights["conv2.weight"][3] *= -1
    checkpoint.safetensors.torch.save_file(weights, home / "forged/model.safetensors")
    code, section, errors = lbs_command(f"verify --run forged {OWN}")
    assert code == 1
    assert not section["passed"]
    assert "conv2" in section["first_difference"]
    assert "FAILED" in errors


def test_a_run_is_packed_for_bytes(home: Path, lbs_command: Command) -> None:
    shutil.copytree(home / "whole", home / "bytes")
    code, packed, _ = lbs_command(f"pack --run bytes --uint8 {OWN}")
    assert (code, packed["input_dtype"]) == (0, "uint8")
    card = json.loads((home / "bytes/network.json").read_text())
    normalize = lbs.load(home / "bytes" / packed["file"]).normalize
    assert normalize is not None
    assert [list(normalize.mean), list(normalize.std)] == [card["mean"], card["std"]]
    code, verified, _ = lbs_command(f"verify --run bytes --images 40 {OWN}")
    assert code == 0
    assert verified["images"] == 360
    assert verified["equal_predictions"] >= 358
    code, timed, _ = lbs_command(f"bench --run bytes {BENCH} --batches 2 {OWN}")
    assert code == 0
    assert [row["contender"] for row in timed["rows"]] == ["packed", "torch float32", "packed uniform 8-bit"]


def test_uniform_and_hand_made_plans_are_fine_tuned(home: Path, lbs_command: Command) -> None:
    weights = "--weights whole/float.safetensors --data digits --model tiny_cli_net:Net --no-augment"
    short = "--epochs 1 --batch-size 128 --threads 1 --calibration 64"
    code, section, _ = lbs_command(f"finetune --run uniform --uniform 4,2 {weights} {short}")
    assert code == 0
    assert {(x.w_bits, x.a_bits) for x in Plan.load(home / "uniform/plan.json").layers} == {(8, 8), (4, 2)}
    text = (home / "whole/plan.json").read_text()
    plan = Plan.from_json(text)
    body = json.loads(text)
    body["layers"][1].update(w_bits=2, kept=[0, 3, 5, 9])
    (home / "hand.json").write_text(json.dumps(body))
    code, section, errors = lbs_command(f"finetune --run hand --plan hand.json {weights} {short}")
    assert code == 0, errors
    assert section["bops"] == Plan.load(home / "hand.json").bops() < plan.bops()
    assert lbs_command(f"pack --run hand {OWN}")[0] == 0
    assert lbs_command(f"verify --run hand --images 8 {OWN}")[0] == 0


def test_no_command_replaces_the_network_of_another(home: Path, lbs_command: Command) -> None:
    plan = (home / "whole/plan.json").read_bytes()
    uniform = "--uniform 8,8 --epochs 1 --batch-size 128 --threads 1 --calibration 64"
    shutil.copytree(home / "whole", home / "mixed")
    shutil.rmtree(home / "mixed/checkpoints")
    code, body, _ = lbs_command(f"finetune --run mixed {uniform} {OWN}")
    assert (code, body["error"]) == (2, "mixed holds a searched network; name a new folder")
    assert (home / "mixed/plan.json").read_bytes() == plan
    shutil.copy(home / "whole/float.safetensors", home / "whole.safetensors")
    named = "--data digits --model tiny_cli_net:Net --no-augment --weights whole.safetensors"
    assert lbs_command(f"finetune --run alike {named} {uniform}")[0] == 0
    plan = (home / "alike/plan.json").read_bytes()
    for again in ("", "--resume"):  # the second goes on with what the first was asked
        code, body, _ = lbs_command(f"search --run alike {named} --epochs 1 --bops 0.03 --threads 1 {again}")
        assert (code, body["error"]) == (2, "alike holds a network of other bits; name a new folder")
    assert (home / "alike/plan.json").read_bytes() == plan


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model digits_resnet8", "tuned holds a network of model tiny_cli_net:Net, asked is digits_resnet8"),
        ("--mean .5 --std .2", "tuned holds a network of mean (0.3"),
        ("--data synthetic", "another data set: digits has the fingerprint"),
    ],
)
def test_a_searched_network_is_fine_tuned_as_it_was_searched(
    home: Path, lbs_command: Command, option: str, message: str
) -> None:
    shutil.rmtree(home / "tuned", ignore_errors=True)
    shutil.copytree(home / "whole", home / "tuned")
    shutil.rmtree(home / "tuned/checkpoints")
    code, body, _ = lbs_command(f"finetune --run tuned {FINETUNE} {option}")
    assert code == 2
    assert message in body["error"]


def test_what_told_of_another_network_is_dropped(home: Path, lbs_command: Command) -> None:
    shutil.copytree(home / "whole", home / "later")
    for name in ("checkpoints", "model.safetensors"):
        path = home / "later" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [lbs_command(f"{line} --run later {OWN}")[0] for line in ("pack", "verify --images 4")] == [0, 0]
    assert lbs_command(f"finetune --run later {FINETUNE} {OWN}")[0] == 0
    results = json.loads((home / "later/results.json").read_text())
    assert not {"pack", "verify", "bench"} & results.keys()
    code, body, _ = lbs_command(f"verify --run later --images 4 {OWN}")
    assert (code, "is older than the network of the run; run lbs pack --run later again" in body["error"]) == (2, True)
    assert [lbs_command(f"{line} --run later {OWN}")[0] for line in ("pack", "verify --images 4")] == [0, 0]
    assert (
        lbs_command(f"finetune --run later --resume --threads 1 {OWN}")[0] == 0
    )  # it was finished: nothing has changed
    assert "verify" in json.loads((home / "later/results.json").read_text())
    assert lbs_command(f"pack --run later {OWN}")[0] == 0
    assert "verify" not in json.loads((home / "later/results.json").read_text())
    code, body, _ = lbs_command("report later --out elsewhere")
    assert (code, Path(body["page"]).name, (home / "elsewhere/report.html").exists()) == (0, "report.html", True)


def test_a_plan_that_was_edited_is_not_gone_on_with(home: Path, lbs_command: Command) -> None:
    shutil.copy(home / "whole/float.safetensors", home / "whole.safetensors")
    shutil.copy(home / "whole/plan.json", home / "edited.json")
    line = "--data digits --model tiny_cli_net:Net --no-augment --weights whole.safetensors --plan edited.json"
    line += " --epochs 1 --batch-size 128 --threads 1 --calibration 64"
    assert lbs_command(f"finetune --run edited {line} {OWN}")[0] == 0
    assert lbs_command(f"finetune --run edited --resume --threads 1 {OWN}")[0] == 0
    body = json.loads((home / "edited.json").read_text())
    body["layers"][1]["w_bits"] = 2 if body["layers"][1]["w_bits"] != 2 else 4
    (home / "edited.json").write_text(json.dumps(body))
    code, body, _ = lbs_command(f"finetune --run edited --resume --threads 1 {OWN}")
    assert code == 2
    assert "edited.json has changed since the run began" in body["error"]


def test_quickstart(home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole road, shortened; then a packed network that disagrees once must fail."""
    short = {**quickstart.SEARCH, "float_epochs": 4, "epochs": 1, "train_images": 640}
    monkeypatch.setattr(quickstart, "SEARCH", short)
    monkeypatch.setattr(quickstart, "FINETUNE", {**quickstart.FINETUNE, "epochs": 1})
    monkeypatch.setattr(quickstart, "LEAST_ACCURACY", 0.8)
    timed = stages.bench_run
    monkeypatch.setattr(quickstart, "bench_run", lambda *args, threads: timed(*args, threads=threads, rounds=2))
    code, body, errors = lbs_command("quickstart --threads 1")
    assert code == 0, errors
    assert body["passed"]
    assert body["verify"]["equal_predictions"] == 360
    assert (home / "runs/quickstart/report.html").exists()
    contenders = {row["contender"] for row in body["bench"]["rows"]}
    assert contenders >= {"packed", "torch float32", "torch bfloat16", "packed uniform 8-bit"}
    assert list(body["bench"]["of_bits"]) == ["1", "64"]
    layers = Plan.load(home / "runs/quickstart/plan.json").layers
    assert sum(layer.kept_filters < layer.filters for layer in layers) >= 2  # the budget takes filters as well as bits
    assert {(layer.w_bits, layer.a_bits) for layer in layers[1:-1]} == {(4, 4)}
    even = lbs.load(home / "runs/quickstart" / body["uniform8"]["file"])
    assert {row.w_bits for row in lbs.explain(even, threads=1).rows if row.w_bits} == {8}
    assert body["uniform8"]["accuracy"] > body["float"]["accuracy"] - 0.01
    record = records.read("runs/quickstart")
    lines = tables.speeds(record)
    assert [line.split(":")[0] for line in lines] == ["batch 1", "batch 64"]
    assert all(line in errors and line in body["summary"] for line in (*lines, tables.bits_pay(record)))
    assert quickstart.free_folder(home / "runs").name == "quickstart-2"

    def disagree(*args: Any, **options: Any) -> dict[str, Any]:
        return {**stages.verify_run(*args, **options), "equal_predictions": 359, "passed": False}

    monkeypatch.setattr(quickstart, "SEARCH", {**short, "float_epochs": 1})
    monkeypatch.setattr(quickstart, "verify_run", disagree)
    monkeypatch.setattr(quickstart, "bench_run", lambda *args, **options: {})
    monkeypatch.setattr(quickstart, "_page", lambda out, folder: str(report(home / "runs/quickstart")))
    code, body, errors = lbs_command("quickstart --run other")
    assert code == 1
    assert not body["passed"]
    assert "every prediction must be equal" in errors


@pytest.mark.slow
@pytest.mark.skipif(extension.cpu is None, reason=f"native module: {extension.cpu_reason}")
def test_quickstart_is_faster_than_uniform_8_bits(home: Path, lbs_command: Command) -> None:
    """In one process on one core of a Zen 5: 1.46 to 1.52 at batch 1, 1.75 to 1.79 at batch 64."""
    code, body, errors = lbs_command("quickstart --run full --threads 1")
    assert code == 0, errors
    packed = {row["batch"]: row["ratios"] for row in body["bench"]["rows"] if row["contender"] == "packed"}
    assert packed[1]["packed uniform 8-bit"] > 1.2, errors
    assert packed[64]["packed uniform 8-bit"] > 1.3, errors
    assert body["verify"]["packed_accuracy"] >= body["uniform8"]["accuracy"] - tables.MOST_LOST
    assert body["uniform8"]["accuracy"] >= body["float"]["accuracy"] - tables.MOST_LOST
