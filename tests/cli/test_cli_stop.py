"""SIGTERM and Ctrl-C end training after the step it is at, saved; it goes on to the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbs.cli import main, quickstart
from lbs.run_folder import RunFolder
from lbs.train import checkpoint, stopping
from lbs.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[[str], tuple[int, Any, str]]
STEPS = 4  # in an epoch: 256 digits in batches of 64
SEARCH = "--data digits --model digits_resnet8 --no-augment --batch-size 64 --train-images 256 --calibration 64"
SEARCH += " --threads 1 --float-epochs 1 --epochs 2 --bops 0.05 --all-epochs --log-every 2"
# Two processes: each stops itself, kills itself or hears SIGTERM before its third step, as it is told.
CHILD = """
import os, signal, sys
from lbs.cli.main import main
from lbs.train.trainer import Trainer

step, taken, victim, number = Trainer._train_step, 0, sys.argv[1], int(sys.argv[2])

def counted(self, images, labels):
    global taken
    taken += 1
    if taken == 3 and os.environ["RANK"] == victim:
        os.kill(os.getpid(), number)
    step(self, images, labels)

Trainer._train_step = counted
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stop") / "whole"
    assert main.main(f"search --run {run} {SEARCH}".split()) == 0
    return run


@pytest.mark.parametrize(
    ("number", "at", "phase"),
    [
        (signal.SIGTERM, 2, "float"),
        (signal.SIGTERM, STEPS, "float"),
        (signal.SIGINT, STEPS + 3, "search"),
        (signal.SIGTERM, 2 * STEPS, "search"),
        (signal.SIGINT, 3 * STEPS, "search"),
    ],
)
def test_a_signal_ends_training_at_the_step_saved(
    whole: Path, tmp_path: Path, lbs_command: Command, monkeypatch: pytest.MonkeyPatch, number: int, at: int, phase: str
) -> None:
    """Inside an epoch, at the end of one, and at that of a phase; the steps of all phases are counted together."""
    taken, step, before = [0], Trainer._train_step, [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def counted(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        taken[0] += 1
        if taken[0] == at:
            signal.raise_signal(number)
        step(self, images, labels)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    code, _, told = lbs_command(f"search --run {tmp_path / 'run'} {SEARCH}")
    assert code == 128 + number
    done = (at - 1) % STEPS + 1 if phase == "float" else at - STEPS
    assert f"{phase}: stopped by {signal.Signals(number).name} after step {done}, saved in " in told
    assert told.rstrip().endswith("go on with --resume")
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    taken[0] = 1 << 20
    assert lbs_command(f"search --run {tmp_path / 'run'} --resume --threads 1")[0] == 0
    assert taken[0] - (1 << 20) == 3 * STEPS - at  # none was lost
    again, expected = (checkpoint.load_weights(run / "searched.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(again[key], expected[key]) for key in expected)

    def rows(run: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in RunFolder(run).metrics()]

    assert rows(tmp_path / "run") == rows(whole)


def test_a_second_signal_acts_at_once() -> None:
    def train() -> None:
        with stopping.noted() as request:
            signal.raise_signal(signal.SIGINT)
            assert (request.number, request.name) == (signal.SIGINT, "SIGINT")
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it goes on")

    with pytest.raises(KeyboardInterrupt) as raised:
        train()
    assert not isinstance(raised.value, stopping.Stopped)


def test_a_signal_that_nobody_looked_at_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), stopping.noted():
        signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.noted() as request:
            signal.raise_signal(signal.SIGINT)
            assert request.number == 0
    finally:
        signal.signal(signal.SIGINT, before)


def start_two(run: Path, victim: str, number: int) -> list[subprocess.Popen[str]]:
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    common = {**os.environ, **rendezvous, "OMP_NUM_THREADS": "1", "LBS_RANK_TIMEOUT": "20", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, victim, str(int(number)), "search", "--run", str(run), *SEARCH.split()]
    return [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_signal_to_one_of_two_ends_both(tmp_path: Path, victim: str) -> None:
    both = start_two(tmp_path / "run", victim, signal.SIGTERM)
    told = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [128 + signal.SIGINT, 128 + signal.SIGTERM], told
    assert all("after step 3, saved in" in text for text in told), told
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert checkpoint.load(RunFolder(tmp_path / "run").checkpoint("float"))[1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_is_named(tmp_path: Path, victim: str, number: int) -> None:
    both = start_two(tmp_path / "run", victim, number)
    lost, left = both[int(victim)], both[1 - int(victim)]
    try:
        told = left.communicate(timeout=240)[1]
    finally:
        lost.kill()
        lost.communicate()
    assert left.returncode == 2, told
    assert f"rank {victim} of 2 gives no answer" in told
    assert "Traceback" not in told


LONG = (
    "--data digits --model digits_resnet8 --no-augment --batch-size 64 --train-images 256 --calibration 64 --threads 1"
)


def named_command(told: str) -> list[str]:
    """The first command that a message says goes on."""
    found = re.search(r"go on with lbs ([^;\n]*)", told)
    assert found, told
    return found[1].split()


@pytest.mark.parametrize(
    "place", ["lbs.runs.network.load_data", "lbs.runs.searches.calibrate", "lbs.runs.phases.evaluate"]
)
def test_an_interruption_between_steps_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as inside:
        inside.setattr(place, stop)
        assert (
            main.main(f"search --run {tmp_path / 'run'} {LONG} --epochs 1 --float-epochs 1 --bops 0.05".split()) == 130
        )
    command = named_command(capsys.readouterr().err)
    assert main.main([*command, "--threads", "1"]) == 0


def test_what_is_not_trained_says_that_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lbs.benchmark.interleave", stop)
    assert main.main(["bench", "--zoo", "cifar100-resnet20", "--batches", "1", "--baselines", "float32"]) == 130
    assert capsys.readouterr().err.endswith("lbs bench: interrupted; nothing was written: call it again\n")
    monkeypatch.setattr("lbs_kernels.tune.tuner.tune", stop)
    assert main.main(["tune", "--zoo", "cifar100-resnet20", "--minutes", "1"]) == 130
    assert "lbs tune: interrupted; what was measured is kept: call it again to go on" in capsys.readouterr().err


def test_a_quickstart_that_was_interrupted_names_the_commands_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        quickstart, "SEARCH", {**quickstart.SEARCH, "float_epochs": 1, "epochs": 1, "train_images": 640}
    )
    step, taken = Trainer._train_step, [0]

    def counted(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        taken[0] += 1
        if taken[0] == 3:
            signal.raise_signal(signal.SIGINT)
        step(self, images, labels)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    assert main.main(f"quickstart --run {tmp_path / 'run'} --threads 1".split()) == 130
    told = capsys.readouterr().err
    assert "stopped by SIGINT after step 3" in told
    for name in ("search", "finetune", "pack", "verify", "bench"):
        assert f"lbs {name} --run {tmp_path / 'run'}" in told
    assert main.main([*named_command(told), "--threads", "1"]) == 0
