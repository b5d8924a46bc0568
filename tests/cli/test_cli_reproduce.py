"""`lbs reproduce`: a row from float weights to record, killed anywhere and resumed, refused where it would change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lbs.data
from lbs import run_folder
from lbs.cli import main
from lbs.cli.reproduce import epochs_of, setting
from lbs.config import FinetuneRun, SearchRun
from lbs.plan import Plan
from lbs.run_folder import RunFolder, write_sealed
from lbs.runs import rows
from lbs.runs.reproduction import Options, open_row, schedule_text
from lbs.train import checkpoint
from lbs.train.trainer import Trainer
from lbs_kernels.errors import LbsError

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(self.relu(self.norm0(self.stem(x))))))
        return self.fc(torch.flatten(self.pool(x), 1))

class Colour(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
"""
TINY = rows.Network(
    "tiny",
    "tiny_reproduced:Net",
    common={"data": "digits", "augment": False, "batch_size": 64, "train_images": 256, "calibration": 64},
    float={"epochs": 2},
    search={"lr": 0.01, "log_every": 1},
    finetune={"lr": 0.02},
)
SHIPPED = dict(rows.ROWS)
STREAMED = rows.Network(
    "streamed",
    "tiny_reproduced:Colour",
    common={"batch_size": 6, "calibration": 6},
    float={"epochs": 1},
    finetune={"lr": 0.02},
)
LINE = "--schedule 2+2 --threads 1"
Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the tiny network; rows `tiny` and `tiny-uniform-4`; the run `whole`, never interrupted."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "tiny_reproduced.py").write_text(NETWORK)
    made = (
        rows._row(TINY, "joint", {"bops": 0.03}, ""),
        rows._uniform(TINY, 4, 4),
        rows._row(STREAMED, "joint", {"bops": 0.03}, ""),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "ROWS", {row.name: row for row in made})
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        assert main.main(f"reproduce tiny --out whole {LINE}".split()) == 0
        yield folder


def digests(folder: Path) -> dict[str, str]:
    """Weights and plan a run ended with, and its rows without the clock."""
    names = ("float.safetensors", "searched.safetensors", "model.safetensors")
    found = {name: checkpoint.digest(checkpoint.load_weights(folder / name)) for name in names}
    metrics = run_folder.RunFolder(folder).metrics()
    found["metrics"] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in metrics])
    tensors, state = checkpoint.load(folder / "checkpoints/finetune.safetensors")
    found["checkpoint"] = checkpoint.digest(tensors) + json.dumps({k: v for k, v in state.items() if k != "seconds"})
    return {**found, "plan": (folder / "plan.json").read_text()}


def test_a_row_from_float_network_to_record(home: Path) -> None:
    record = json.loads((home / "whole/record.json").read_text())
    plan = Plan.load(home / "whole/plan.json")
    assert record["bops"] == plan.bops() <= record["target_bops"] == 0.03 * plan.full_precision_bops()
    assert record["schedule"] == "2+2 of 30+200 epochs, 256 training images"
    assert record["equal_predictions"] == record["identical_outputs"] == record["images"] == 360
    assert record["packed_top1"] == record["fine_tuned_top1"] <= record["best_epoch_top1"]
    assert record["seeds"] == {"float": 0, "search": 0, "finetune": 0}
    assert set(record["seconds"]) == {"float", "search", "finetune", "pack", "verify"}
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["commit"]
    assert str(home) not in json.dumps(record)
    assert record["config"]["finetune"]["milestones"] == [80, 120]
    assert record["unreadable"] == 0
    assert record["targets"] == json.loads((home / "whole/results.json").read_text())["search"]["targets"]
    reached = record["targets"]["bops"]
    last = [row for row in run_folder.RunFolder(home / "whole").metrics() if row["phase"] == "search"][-1]
    assert reached["thresholds"] == last["bops"] != reached["value"]


class Killer:
    """Ends the command at its n-th training step, or when it is about to put a file of some name in place."""

    def __init__(self, patch: pytest.MonkeyPatch, step: int | None = None, file: str = "", count: int = 1) -> None:
        self.steps, self.file, self.count = step, file, count
        inner, replace = Trainer._train_step, os.replace

        def train_step(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
            if self.steps is not None:
                self.steps -= 1
                if self.steps < 0:
                    raise KeyboardInterrupt
            inner(trainer, images, labels)

        def put(source: Any, target: Any) -> None:
            if self.file and str(target).endswith(self.file):
                self.count -= 1
                if self.count == 0:
                    raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(Trainer, "_train_step", train_step)
        patch.setattr(run_folder.os, "replace", put)


# 4 steps an epoch, 2 epochs a phase. The files in the order they are written at the switches between phases.
SWITCHES = [
    ("float.safetensors", 2),  # the first is the checkpoint of the first epoch
    ("float-best.safetensors", 1),
    ("float.safetensors", 3),
    ("results.json", 1),
    ("searched.safetensors", 1),
    ("plan.json", 1),
    ("results.json", 2),
    ("finetune.safetensors", 1),
    ("plan.json", 2),
    ("model.safetensors", 1),
    ("results.json", 3),
    ("packed.lbs.safetensors", 1),
    ("results.json", 4),
    ("record.json", 1),
]
QUICK = {("searched.safetensors", 1), ("results.json", 2)}
KILLS = [
    pytest.param({"step": 10}, id="step10"),
    pytest.param({"step": 21}, id="step21", marks=pytest.mark.slow),
    *[
        pytest.param(
            {"file": file, "count": count},
            id=f"{file}-{count}",
            marks=() if (file, count) in QUICK else (pytest.mark.slow,),
        )
        for file, count in SWITCHES
    ],
]


@pytest.mark.parametrize("kill", KILLS)
def test_killed_anywhere_it_goes_on_to_the_same_bits(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch, kill: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        Killer(patch, **kill)
        assert lbs_command(f"reproduce tiny --out {folder} {LINE}")[0] == 130
    code, record, errors = lbs_command(f"reproduce tiny --out {folder} --resume --threads 1")
    assert code == 0, errors
    assert digests(folder) == digests(home / "whole")
    whole = json.loads((home / "whole/record.json").read_text())
    changing = ("seconds", "environment", "bytes", "hash")
    assert {k: v for k, v in record.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }


def test_a_uniform_row_starts_from_the_weights_that_were_named(home: Path, lbs_command: Command) -> None:
    line = "reproduce tiny-uniform-4 --out uniform --weights whole/float.safetensors --schedule 1 --threads 1"
    code, record, errors = lbs_command(f"{line} --record copy.json --curve cosine --finetune distill=0.5")
    assert code == 0, errors
    assert {(x.w_bits, x.a_bits) for x in Plan.load(home / "uniform/plan.json").layers} == {(8, 8), (4, 4)}
    assert record["target_bops"] is None
    assert record["float_top1"] == json.loads((home / "whole/record.json").read_text())["float_top1"]
    assert record["config"]["finetune"]["schedule"] == "cosine"
    assert json.loads((home / "copy.json").read_text()) == record


def test_another_network_teaches_and_the_average_is_kept(home: Path, lbs_command: Command) -> None:
    line = "reproduce tiny-uniform-4 --out taught --weights whole/float.safetensors --schedule 1 --threads 1"
    teacher = "--finetune teacher=tiny_reproduced:Net --finetune teacher_weights=whole/float.safetensors"
    code, record, errors = lbs_command(f"{line} --distill 0.5 --finetune ema=0.9 {teacher}")
    assert code == 0, errors
    assert record["verified"]
    assert record["schedule"] == "1 of 200 epochs, 256 training images, distilled from tiny_reproduced:Net"
    config = record["config"]["finetune"]
    assert config["teacher_weights"] == "float.safetensors"
    assert config["teacher_weights_digest"] == record["config"]["float"]["weights_digest"]
    kept = checkpoint.load_weights(home / "taught/model.safetensors")
    trained, _ = checkpoint.load(home / "taught/checkpoints/finetune.safetensors")
    assert torch.equal(kept["fc.weight"], trained["average/fc.weight"])
    assert torch.equal(kept["norm1.num_batches_tracked"], trained["model/norm1.num_batches_tracked"])
    assert not torch.equal(kept["fc.weight"], trained["model/fc.weight"])
    code, body, _ = lbs_command(
        f"{line.replace('taught', 'other')} --distill 0.5 {teacher.replace('whole/float', 'no')}"
    )
    assert code == 2
    assert "no.safetensors cannot be read" in body["error"]


def test_a_resumed_row_names_everything_that_differs(home: Path, lbs_command: Command) -> None:
    before = {path: path.read_bytes() for path in (home / "whole").rglob("*") if path.is_file()}
    code, body, _ = lbs_command("reproduce tiny --out whole --resume --seed 3 --schedule 4+2")
    assert code == 2
    assert "float has seed 0, asked is 3; search has epochs 2, asked is 4" in body["error"]
    assert "finetune has seed 0, asked is 3" in body["error"]
    code, body, _ = lbs_command("reproduce tiny --out whole --resume --search gain=0.5")
    assert "search has gain 0.004, asked is 0.5" in body["error"]
    code, body, _ = lbs_command("reproduce tiny-uniform-4 --out whole --resume")
    assert "row 'tiny', asked is 'tiny-uniform-4'" in body["error"]
    code, body, _ = lbs_command(f"reproduce tiny --out whole {LINE}")
    assert "already holds a float" in body["error"]
    code, body, _ = lbs_command("reproduce tiny --out elsewhere --resume")
    assert "no float to resume" in body["error"]
    assert {path: path.read_bytes() for path in before} == before


def write_set(path: Path, seed: int) -> None:
    data = lbs.data.synthetic(classes=3, train=128, test=32, size=8, channels=1, seed=seed)
    np.savez(path, **{name: getattr(data, name).numpy() for name in ("train_x", "train_y", "test_x", "test_y")})


def test_a_data_set_that_changed_under_its_name_is_refused(home: Path, lbs_command: Command) -> None:
    line = "reproduce tiny --out changing --data own.npz --train-images 128 --threads 1"
    write_set(home / "own.npz", seed=1)
    assert lbs_command(f"{line} --schedule 1+1 --float-epochs 1")[0] == 0
    shutil.copy(home / "changing/results.json", home / "kept.json")
    write_set(home / "own.npz", seed=2)
    results = RunFolder(home / "changing").results()
    for name in ("finetune", "pack", "verify"):
        del results[name]
    write_sealed(home / "changing/results.json", results)
    code, body, _ = lbs_command(f"{line} --resume")
    assert code == 2
    assert "another data set: own.npz has the fingerprint" in body["error"]
    shutil.copy(home / "kept.json", home / "changing/results.json")
    code, body, _ = lbs_command("verify --run changing --model tiny_reproduced:Net")
    assert code == 2
    assert "another data set: own.npz" in body["error"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:left out")
def test_a_streamed_folder_makes_a_row_and_goes_on_in_the_middle_of_an_epoch(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    for part, count in (("train", 18), ("val", 7)):
        for index in range(count):
            place = tmp_path / "set" / part / f"c{index % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40 + index, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.jpg")
    (tmp_path / "set/train/c0/broken.jpg").write_bytes(b"no image")
    line = f"--data imagenet:{tmp_path}/set --schedule 2+2 --threads 1"
    code, body, _ = lbs_command(f"reproduce streamed --out {tmp_path}/strict {line}")
    assert code == 2
    assert "1 of 19 images cannot be read, at most 0.00%" in body["error"]
    line += " --max-unreadable 0.1"
    assert lbs_command(f"reproduce streamed --out {tmp_path}/whole {line}")[0] == 0
    assert "broken.jpg" in json.dumps(
        json.loads((tmp_path / "whole/results.json").read_text())["finetune"]["unreadable"]
    )
    with monkeypatch.context() as patch:
        Killer(patch, step=7)
        assert lbs_command(f"reproduce streamed --out {tmp_path}/parts {line}")[0] == 130
    code, record, errors = lbs_command(f"reproduce streamed --out {tmp_path}/parts --resume --threads 1")
    assert code == 0, errors
    assert record["equal_predictions"] == record["images"] == 7
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reproduce nothing", "no row is called 'nothing'; the rows are tiny"),
        ("reproduce tiny --schedule 8", "takes two numbers, such as 8+30"),
        ("reproduce tiny --schedule 8+x", "takes two numbers"),
        ("reproduce tiny --search wings=2", "keys are amp, augment"),
        ("reproduce tiny --search gain=word", "--search gain=word: gain takes a finite number such as 0.03 or 3e-2"),
        ("reproduce tiny --search bits=2,x", "bits takes whole numbers with commas between them, such as 2,4,8"),
        ("reproduce tiny --search bits=2,5", "bit chain (2, 5): 5 is no larger integer multiple of 2"),
        ("reproduce tiny --search exclude=conv9*", "exclude='conv9*' matches no layer; the layers are stem, conv1, fc"),
        ("reproduce", "name a ROW of --list; only --resume --out DIR takes it from the run in DIR"),
        ("reproduce --resume", "bad holds no run of a row; name the row too: lbs reproduce ROW --out bad"),
        ("reproduce tiny-uniform-4 --bops 0.5", "has no search"),
        ("reproduce tiny --bops 0.00001", "out of reach"),
        ("reproduce tiny --weights other.safetensors", "is for 7 classes (fc.weight is (7, 16)), the data set digits"),
        ("reproduce tiny --search ema=0.9", "ema=0.9: a search goes by the weights as they are"),
        (
            "reproduce tiny --distill 0.5 --finetune teacher=cifar_resnet20 --finetune teacher_weights=ok.safetensors",
            "cifar_resnet20 fails on an image (1, 8, 8)",
        ),
        (
            "reproduce tiny --distill 0.5 --finetune teacher=tiny_reproduced:Net "
            "--finetune teacher_weights=other.safetensors",
            "is for 7 classes",
        ),
        (
            "reproduce tiny --search streams=8 --finetune streams=32",
            "streams=32 for fine-tuning, of a network that is searched with streams=8; name it for the search alone",
        ),
        (
            "reproduce tiny --finetune streams=8",
            "streams=8 for fine-tuning, of a network that is searched with streams=32",
        ),
        ("reproduce tiny --search mode=backwards --weights ok.safetensors", "mode=backwards is not known; use joint"),
    ],
)
def test_bad_input_is_one_clear_line(home: Path, lbs_command: Command, line: str, message: str) -> None:
    state = checkpoint.load_weights(home / "whole/float.safetensors")
    checkpoint.safetensors.torch.save_file(state, home / "ok.safetensors")
    state["fc.weight"], state["fc.bias"] = torch.zeros(7, 16), torch.zeros(7)
    checkpoint.safetensors.torch.save_file(state, home / "other.safetensors")
    shutil.rmtree(home / "bad", ignore_errors=True)
    code, body, errors = lbs_command(f"{line} --out bad --train-images 64 --threads 1")
    assert code == 2, errors
    assert message in body["error"], body["error"]
    assert not (home / "bad/checkpoints").exists()  # nothing was trained before the mistake was told


def test_a_row_is_resumed_by_its_folder_alone(home: Path, lbs_command: Command) -> None:
    before = digests(home / "whole")
    code, record, errors = lbs_command("reproduce --out whole --resume --threads 1")
    assert (code, record["row"]) == (0, "tiny"), errors
    assert digests(home / "whole") == before
    assert lbs_command("reproduce --resume")[1]["error"].startswith("name a ROW of --list")


@pytest.mark.filterwarnings("ignore:left out")
def test_unreadable_images_of_a_folder_in_memory_are_counted(home: Path, lbs_command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for part, index in [("train", i) for i in range(18)] + [("test", i) for i in range(6)]:
        place = tmp_path / "set" / part / f"c{index % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{index}.png")
    (tmp_path / "set/train/c0/broken.png").write_bytes(b"no image")
    line = f"reproduce streamed --data {tmp_path}/set --schedule 1+1 --threads 1 --max-unreadable 0.1"
    code, record, errors = lbs_command(f"{line} --out {tmp_path}/run")
    assert code == 0, errors
    assert record["unreadable"] == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    for phase in ("float", "search", "finetune"):
        (file,) = results[phase]["unreadable"]
        assert file.endswith("broken.png")


def test_all_phases_share_one_reading_of_the_data(
    home: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], lbs.data.load
    monkeypatch.setattr("lbs.data.load", lambda *source: read.append(source) or load(*source))
    code, _, errors = lbs_command("reproduce tiny --out once --schedule 1+1 --threads 1")
    assert code == 0, errors
    assert [share for _, share in read] == [0.0, 1.0, 1.0]  # the phases; packing and verifying, of what is left


def test_a_network_that_is_not_fine_tuned_is_told_so(home: Path, lbs_command: Command, tmp_path: Path) -> None:
    line = f"reproduce tiny --out {tmp_path}/untuned --schedule 1+0 --threads 1"
    code, record, errors = lbs_command(line)
    assert code == 0, errors
    assert record["fine_tuned_top1"] is record["best_epoch"] is None
    assert "not fine-tuned" in errors
    code, body, _ = lbs_command(f"reproduce tiny --out {tmp_path}/nothing --float-epochs 0 --schedule 1+1 --threads 1")
    assert (code, "a float network needs weights or training" in body["error"]) == (2, True)


def test_schedules_are_named_by_what_was_run() -> None:
    search, full = SearchRun(epochs=30, full_epochs=30), FinetuneRun()
    results = {"search": {"epochs": 2, "seconds": 61.0}, "finetune": {"epochs": 16, "seconds": 35 * 60.1}}
    assert schedule_text({"search": search, "finetune": full}, results) == "30+200 epochs"
    short = {"search": SearchRun(epochs=8, full_epochs=30), "finetune": FinetuneRun(epochs=30, amp="bf16")}
    assert schedule_text(short, results) == "8+30 of 30+200 epochs, bfloat16 autocast"
    limited = {"search": search, "finetune": FinetuneRun(epochs=30, minutes=35.0)}
    assert schedule_text(limited, results) == "30+16 of 30+200 epochs"
    in_time = {"search": search, "finetune": FinetuneRun(epochs=30, minutes=36.0)}
    assert schedule_text(in_time, results) == "30+30 of 30+200 epochs"
    hurried = {"search": SearchRun(epochs=30, full_epochs=30, minutes=1.0), "finetune": full}
    assert schedule_text(hurried, results) == "2+200 of 30+200 epochs"
    assert schedule_text({"finetune": FinetuneRun(epochs=5)}, results) == "5 of 200 epochs"


def test_options_on_the_command_line() -> None:
    row = rows._uniform(TINY, 4, 4)
    assert epochs_of("30", row) == (None, 30)
    assert setting(FinetuneRun, "milestones=[3,5]") == ("milestones", (3, 5))
    for text in (".16", "0.16", "16e-2", "+.16"):
        assert setting(SearchRun, f"prune_lr={text}") == ("prune_lr", 0.16)
    assert setting(SearchRun, "exclude=[ab]*,fc") == ("exclude", ("[ab]*", "fc"))
    assert setting(SearchRun, 'exclude=["a,b"]') == ("exclude", ("a,b",))
    for text in ("prune_lr=inf", "epochs=2.5", "pruning=perhaps", "mean=red"):
        with pytest.raises(LbsError, match=f"--search {text}: {text.split('=')[0]} takes "):
            setting(SearchRun, text)
    with pytest.raises(LbsError, match="give KEY=VALUE"):
        setting(SearchRun, "gain")


def test_fine_tuning_has_what_makes_the_network_from_the_search(tmp_path: Path) -> None:
    named: Options = {"common": {}, "float": {}, "search": {"streams": 8, "exclude": ("fc",)}, "finetune": {}}
    configs = open_row(rows._row(TINY, "joint", {}, ""), named, RunFolder(tmp_path), resume=False)
    assert isinstance(configs["finetune"], FinetuneRun)
    assert (configs["finetune"].streams, configs["finetune"].exclude) == (8, ("fc",))


def test_every_row_is_listed_with_what_was_published(lbs_command: Command) -> None:
    code, body, _ = lbs_command("reproduce --list")
    assert code == 0
    assert [row["row"] for row in body["rows"]] == ["tiny", "tiny-uniform-4", "streamed"]
    joint = SHIPPED["cifar100-resnet20"]
    assert joint.published is not None
    assert (joint.target, joint.published.top1, joint.published.bops) == (630.6e6, 68.1, 630.6e6)
    for network in ("cifar100-resnet20", "cifar100-resnet56"):
        variants = {row.variant for row in SHIPPED.values() if row.network.name == network}
        assert variants >= {"joint", "quant-only", "prune-only", "two-stage", "multi-path", "greedy", "uniform-4"}
        assert SHIPPED[f"{network}-uniform-4-2"].finetune == {"uniform": (4, 2)}
