"""A training command that SIGKILL ends in the middle of an epoch goes on there, to the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lbs.cli import main
from lbs.plan import Plan
from lbs.run_folder import RunFolder
from lbs.train import checkpoint
from lbs.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 22  # in an epoch: 1437 digits in batches of 64
COMMON = "--batch-size 64 --threads 1 --calibration 64 --epochs 2 --log-every 3"
SEARCH = f"{COMMON} --data digits --model digits_resnet8 --no-augment --float-epochs 1 --bops 0.02 --all-epochs"
FINETUNE = f"{COMMON} --distill 0.3"
# Runs a command line, keeps a checkpoint after every step, and dies before step `argv[1]`.
CHILD = """
import dataclasses, os, signal, sys
from lbs.cli.main import main
from lbs.train.trainer import Trainer

step, left = Trainer._train_step, int(sys.argv[1])

def counted(self, images, labels):
    global left
    self.recipe = dataclasses.replace(self.recipe, checkpoint_seconds=0.0)
    if self.phase != "float":
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    step(self, images, labels)

Trainer._train_step = counted
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("sigkill") / "whole"
    assert main.main(f"search --run {run} {SEARCH}".split()) == 0
    assert main.main(f"finetune --run {run} {FINETUNE}".split()) == 0
    return run


def kill(line: str, step: int) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(step), *line.split()], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def resume(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Go on in this process, whose random state is another; returns the number of steps that were still taken."""
    torch.manual_seed(1234)
    taken, step = [0], Trainer._train_step

    def counted(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        taken[0] += 1
        step(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", counted)
        assert main.main([*line.split(), "--resume"]) == 0
    return taken[0]


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in RunFolder(run).metrics()]


def check_killed(whole: Path, search_step: int, finetune_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = whole.with_name(f"killed-{search_step}-{finetune_step}")
    kill(f"search --run {run} {SEARCH}", search_step)
    assert resume(f"search --run {run} --threads 1", monkeypatch) == 2 * STEPS - search_step
    kill(f"finetune --run {run} {FINETUNE}", finetune_step)
    assert resume(f"finetune --run {run} --threads 1", monkeypatch) == 2 * STEPS - finetune_step
    for name in ("float.safetensors", "searched.safetensors", "model.safetensors"):
        again, expected = (checkpoint.load_weights(folder / name) for folder in (run, whole))
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in expected), name
    assert Plan.load(run / "plan.json") == Plan.load(whole / "plan.json")
    assert (run / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert rows(run) == rows(whole)
    # One epoch in float, two of search and two of fine-tuning.
    assert sum(row["kind"] == "step" for row in rows(run)) == STEPS // 3 + 2 * (2 * STEPS // 3)
    assert not list(run.rglob("*.part"))
    for section in ("search", "finetune"):
        first, second = (json.loads((folder / "results.json").read_text())[section] for folder in (run, whole))
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_in_an_epoch(whole: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    places = [place for place in range(1, 2 * STEPS) if place % STEPS]
    check_killed(whole, chance.choice(places), chance.choice(places), monkeypatch)
