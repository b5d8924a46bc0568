"""Trainer and checkpoints: a run that was killed goes on bit for bit, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbs.data
from lbs.recipe import Recipe
from lbs.run_folder import RunFolder
from lbs.search import Budget, SearchConfig, parameter_groups, prepare, uniform
from lbs.train import checkpoint
from lbs.train.trainer import Trainer, _below, evaluate
from lbs_kernels.errors import CheckpointError, DataError, TrainingError


class Small(nn.Module):
    """Two convolutions, the first prunable, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


DATA = lbs.data.synthetic(classes=4, train=48, test=20, size=8, channels=1, seed=3)


class KilledError(Exception):
    """Stands for the end of the process."""


class KillAt:
    """Progress that ends the run after some steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def begin(self, phase: str, total: int, done: int) -> None: ...

    def note(self, row: dict[str, Any]) -> None: ...

    def end(self) -> None: ...

    def advance(self, steps: int) -> None:
        if self.left == 0:
            raise KilledError
        self.left -= 1


def make(folder: RunFolder | None, kind: str, progress: Any = None, **changes: Any) -> Trainer:
    """A trainer as a fresh process would build it."""
    torch.manual_seed(7)
    model: nn.Module = Small()
    recipe = Recipe(**{"epochs": 3, "lr": 0.05, "log_every": 2, "checkpoint_seconds": 0.0, **changes})
    budget = groups = None
    if kind == "averaged":
        images, _ = next(iter(lbs.data.eval_loader(DATA, 16)))
        model, recipe = lbs.calibrate(uniform(model, images, 4, 4), [images]), replace(recipe, ema=0.9)
    if kind == "search":
        model = prepare(model, torch.zeros(1, 1, 8, 8), SearchConfig(group_size=2))
        groups = parameter_groups(model, recipe.lr, gate_lr=0.05, prune_lr=0.1)
        budget = Budget(model, bops=0.05, strength=1.0, gain=0.01)
    return Trainer(
        model,
        lbs.data.train_loader(DATA, 8, seed=5),
        recipe,
        phase=kind,
        test=lbs.data.eval_loader(DATA, 16),
        groups=groups,
        budget=budget,
        folder=folder,
        progress=progress,
    )


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Metrics without the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in folder.metrics()]


@pytest.mark.parametrize("kind", ["float", "search", "averaged"])
@pytest.mark.parametrize("kill", [3, 6, 7, 17])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, kind: str, kill: int) -> None:
    """6 steps an epoch: killed inside the first, at its end, just behind it, and inside the last."""
    whole = RunFolder(tmp_path / "whole")
    expected = make(whole, kind)
    result = expected.fit()
    torch.manual_seed(99)  # the state of the generators must come from the file
    parts = RunFolder(tmp_path / "parts")
    with pytest.raises(KilledError):
        make(parts, kind, KillAt(kill)).fit()
    resumed = make(parts, kind)
    again = resumed.fit(resume=True)
    for (name, a), b in zip(expected.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (again.loss, again.accuracy, again.best_accuracy) == (result.loss, result.accuracy, result.best_accuracy)
    assert rows(parts) == rows(whole)
    assert [row["step"] for row in rows(whole) if row["kind"] == "step"] == list(range(2, 19, 2))


def test_the_running_average_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    """Against the recurrence e <- k e + (1 - k) w, k = min(decay, (1 + n) / (10 + n)), from those at the start."""
    folder = RunFolder(tmp_path)
    trainer = make(folder, "averaged")
    name, seen = "conv1.weight", 0
    expected = trainer.model.get_parameter(name).detach().double().clone()

    class Follow(KillAt):
        def advance(self, steps: int) -> None:
            nonlocal expected, seen
            now = trainer.model.get_parameter(name).detach().double()
            keep = min(0.9, (1 + seen) / (10 + seen))
            expected, seen = keep * expected + (1 - keep) * now, seen + 1

    trainer.progress = Follow(0)
    result = trainer.fit()
    assert seen == 18
    torch.testing.assert_close(trainer.model.get_parameter(name).detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert result.accuracy == evaluate(trainer.model, lbs.data.eval_loader(DATA, 16))
    saved = _below("model", checkpoint.load(folder.checkpoint("averaged"))[0])
    assert not torch.equal(saved[name], trainer.model.state_dict()[name])  # training goes on from the weights


def test_a_search_averages_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ema=0\.9: a search goes by the weights"):
        make(None, "search", ema=0.9)


def test_a_phase_that_reached_its_goal_stops_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    trainer = make(folder, "search")
    assert isinstance(trainer.budget, Budget)
    trainer.stop = lambda: trainer.budget.frozen  # type: ignore[union-attr]
    result = trainer.fit()
    assert trainer.budget.frozen
    assert result.steps == trainer.budget.steps < 18
    assert result.accuracy is not None
    again = make(folder, "search").fit(resume=True)
    assert (again.steps, again.loss, again.accuracy) == (result.steps, result.loss, result.accuracy)


def test_training_learns_and_evaluates_every_image(tmp_path: Path) -> None:
    trainer = make(RunFolder(tmp_path), "float", epochs=12)
    before = evaluate(trainer.model, lbs.data.eval_loader(DATA, 7))
    result = trainer.fit()
    assert result.accuracy is not None
    assert result.accuracy > before + 0.2
    trainer.model.eval()
    hits = sum(int(trainer.model(x).argmax(1).eq(y).sum()) for x, y in lbs.data.eval_loader(DATA, 1))
    assert evaluate(trainer.model, lbs.data.eval_loader(DATA, 7)) == hits / len(DATA.test_y)
    best = checkpoint.load_weights(RunFolder(tmp_path).best("float"))
    assert best.keys() == trainer.model.state_dict().keys()


def test_distillation_and_autocast_change_the_step_but_not_the_loop() -> None:
    torch.manual_seed(1)
    teacher = Small()
    losses = set()
    for options in ({}, {"distill": 0.5}, {"amp": "bf16"}):
        trainer = make(None, "float", epochs=1, **{k: v for k, v in options.items() if k != "distill"})
        if "distill" in options:
            trainer = Trainer(
                trainer.model, trainer.train, Recipe(epochs=1, lr=0.05, distill=0.5), phase="float", teacher=teacher
            )
        losses.add(trainer.fit().loss)
    assert len(losses) == 3
    with pytest.raises(TrainingError, match="needs a teacher"):
        make(None, "float", distill=0.5)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "float", epochs=1).fit()
    before = folder.checkpoint("float").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.*resume=True"):
        make(folder, "float", epochs=1).fit()
    assert folder.checkpoint("float").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_kill_while_saving_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    trainer = make(folder, "float", epochs=1)
    trainer.fit()
    before = folder.checkpoint("float").read_bytes()

    def killed(_source: object, _target: object) -> None:
        raise KilledError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KilledError):
        trainer.save()
    monkeypatch.undo()
    assert folder.checkpoint("float").read_bytes() == before
    make(folder, "float", epochs=1).load()


def test_a_loss_that_is_no_number_names_the_layer_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    trainer = make(folder, "float", epochs=2)
    trainer.fit()
    before = folder.checkpoint("float").read_bytes()
    broken = make(folder, "float", epochs=2)
    with torch.no_grad():
        broken.model.conv2.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr,index,operator]
    with pytest.raises(TrainingError, match=r"loss of step 0 .*layer conv2: its parameter conv2.weight is NaN"):
        broken.fit()
    assert folder.checkpoint("float").read_bytes() == before
    with pytest.raises(TrainingError, match="conv2"):
        broken.save()
    assert folder.checkpoint("float").read_bytes() == before


def test_an_output_that_overflows_names_its_layer() -> None:
    trainer = make(None, "float", epochs=1)
    with torch.no_grad():
        trainer.model.fc.weight.fill_(3e38)  # type: ignore[union-attr,operator]
        trainer.model.norm2.weight.fill_(1e3)  # type: ignore[union-attr,operator]
    with pytest.raises(TrainingError, match="layer fc: its output is NaN or infinite although"):
        trainer.fit()


def test_a_loss_that_breaks_later_leaves_the_checkpoint_of_the_epoch_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    trainer = make(folder, "float", epochs=3, checkpoint_seconds=1e9)
    step = trainer._train_step

    def spoiled(images: Tensor, labels: Tensor) -> None:
        if trainer.step == 8:
            trainer.model.norm1.bias.data[2] = float("inf")  # type: ignore[union-attr,operator]
        step(images, labels)

    trainer._train_step = spoiled  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"loss of step 8 \(epoch 1\) .*layer norm1: its parameter norm1.bias"):
        trainer.fit()
    tensors, state = checkpoint.load(folder.checkpoint("float"))
    assert state["step"] == 6
    assert all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())
    assert make(folder, "float", epochs=3).fit(resume=True).steps == 18


def test_thresholds_that_would_close_a_whole_layer_leave_one_group(tmp_path: Path) -> None:
    """Whatever the rate of the pruning threshold, a network stays a network."""
    torch.manual_seed(7)
    model = prepare(Small(), torch.zeros(1, 1, 8, 8), SearchConfig(group_size=2, max_pruning_ratio=0.99))
    trainer = Trainer(
        model,
        lbs.data.train_loader(DATA, 8, seed=5),
        Recipe(epochs=1, lr=0.01),
        phase="search",
        groups=parameter_groups(model, 0.01, gate_lr=0.0, prune_lr=1e6),
        budget=Budget(model, bops=0.019, strength=1.0, gain=0.01),
        folder=RunFolder(tmp_path),
    )
    trainer.fit()
    kept = {name: len(layer.prune.kept()) for name, layer in trainer.budget.layers.items() if layer.prune}  # type: ignore[union-attr,attr-defined]
    assert kept
    assert set(kept.values()) == {2}  # of 8 filters: one group of two


def test_a_model_with_too_few_classes_is_refused() -> None:
    narrow = Small()
    narrow.fc = nn.Linear(8, 3)
    trainer = Trainer(narrow, lbs.data.train_loader(DATA, 8), Recipe(epochs=1, lr=0.1), phase="float")
    with pytest.raises(DataError, match=r"gives 3 classes, the training labels go up to 3; give a model of 4 classes"):
        trainer.fit()


@pytest.mark.parametrize("change", ["data", "batch", "seed"])
def test_other_batches_are_no_resumption(tmp_path: Path, change: str) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(KilledError):
        make(folder, "float", KillAt(4)).fit()
    trainer = make(folder, "float")
    other = lbs.data.synthetic(classes=4, train=48, test=20, size=8, channels=1, seed=4)
    trainer.train = lbs.data.train_loader(
        other if change == "data" else DATA, 6 if change == "batch" else 8, seed=6 if change == "seed" else 5
    )
    with pytest.raises(TrainingError, match=rf"the saved loader had {change}.* = "):
        trainer.fit(resume=True)


def test_minutes_end_a_phase_and_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lbs.train.trainer.time.monotonic", lambda: clock[0])
    trainer = make(RunFolder(tmp_path), "float", epochs=100, minutes=1.0, schedule="cosine", log_every=1)
    step = trainer._train_step

    def timed(images: Tensor, labels: Tensor) -> None:
        step(images, labels)
        clock[0] += 6.0

    trainer._train_step = timed  # type: ignore[method-assign]
    result = trainer.fit()
    assert (result.steps, result.epochs) == (10, 2)
    assert result.accuracy is not None
    rates = [row["lr"] / 0.05 for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"]
    assert rates[:1] + rates[5:6] == pytest.approx([1.0, 0.5])
    assert make(RunFolder(tmp_path), "float", epochs=100, minutes=1.0).fit(resume=True).steps == 10


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "newer", "missing", "phase"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "float", epochs=1).fit()
    path = folder.checkpoint("float")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "flipped":
        content[-40] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        checkpoint.save_weights(path, Small())
    elif damage == "newer":
        path.write_bytes(content.replace(b'"version":"1"', b'"version":"9"'))
    elif damage == "missing":
        path.unlink()
    else:
        tensors, state = checkpoint.load(path)
        checkpoint.save(path, tensors, {**state, "phase": "search"})
    with pytest.raises(CheckpointError):
        make(folder, "float", epochs=1).load()


def test_weights_come_from_state_dicts_only(tmp_path: Path) -> None:
    model = Small()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pth")
    tensors = checkpoint.load_weights(tmp_path / "a.pth")
    target = Small()
    checkpoint.apply_weights(target, tensors, "a.pth")
    own = target.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    torch.save(model, tmp_path / "object.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        checkpoint.load_weights(tmp_path / "object.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a file of torch")
    for name in ("noise.pth", "absent.pth", "noise.safetensors"):
        with pytest.raises(CheckpointError):
            checkpoint.load_weights(tmp_path / name)
    tensors["fc.weight"] = torch.zeros(5, 8)
    del tensors["fc.bias"]
    with pytest.raises(CheckpointError, match=r"missing: fc.bias \(1\); other shape: fc.weight \(5, 8\) for \(4, 8\)"):
        checkpoint.apply_weights(target, tensors, "a.pth")


def test_learning_rate_curves() -> None:
    step = Recipe(epochs=10, lr=0.1, schedule="step", milestones=(4, 8), warmup=1)
    assert [round(step.lr_factor(s, 2), 4) for s in (0, 1, 2, 7, 8, 15, 16)] == [0.5, 1, 1, 1, 0.1, 0.1, 0.01]
    cosine = Recipe(epochs=4, lr=0.1)
    assert cosine.lr_factor(0, 5) == 1
    assert abs(cosine.lr_factor(10, 5) - 0.5) < 1e-12
    for bad in ({"epochs": -1}, {"lr": 0.0}, {"schedule": "linear"}, {"amp": "fp16"}, {"distill": 2.0}):
        with pytest.raises(TrainingError, match=next(iter(bad))):
            Recipe(**{"epochs": 1, "lr": 0.1, **bad})


def test_metrics_survive_a_line_cut_short(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"loss": float("nan"), "gates": {"a": float("inf")}})
    with folder.file("metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.')
    assert folder.metrics() == [{"loss": None, "gates": {"a": None}}]
    folder.file("metrics.jsonl").write_text('{"loss\n' + json.dumps({"loss": 1}) + "\n")
    with pytest.raises(CheckpointError, match="line 1 is not JSON"):
        folder.metrics()
    folder.file("metrics.jsonl").write_text('[3]\n{"loss": 1}\n')
    with pytest.raises(CheckpointError, match=r"line 1 is not JSON: \[3\] is no object; delete that line"):
        folder.metrics()


def test_metrics_that_cannot_be_written_name_their_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.file("metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl could not be written \(one row\)"):
        folder.append_metrics({"loss": 1.0})
