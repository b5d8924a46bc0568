"""Recorded training steps against single ones: the same weights, gates, sums and files, bit for bit.

CUDA graphs are played by tests/search/graph_of_operations.py; the test on a GPU is at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_of_operations
import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.data
import lbs.models
from lbs.quant import fused
from lbs.recipe import Recipe
from lbs.run_folder import RunFolder
from lbs.search.budget import Budget, parameter_groups
from lbs.train import recorded
from lbs.train.recorded import SINGLE_STEPS, RecordedSteps
from lbs.train.trainer import Trainer
from lbs_kernels.errors import TrainingError

DATA = lbs.data.synthetic(10, 32, 16, 8, 1)
STEPS = 20


def network(kind: str, importance: str = "gamma") -> nn.Module:
    torch.manual_seed(3)
    model, images = lbs.models.create("digits_resnet8"), next(iter(lbs.data.eval_loader(DATA, 16)))[0]
    if kind == "float":
        return model
    if kind == "fine-tuning":
        return lbs.calibrate(lbs.uniform(model, images, 4, 2), [images])
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.num_batches_tracked.fill_(1)  # type: ignore[union-attr]  # not fresh: the budget is met midway from here
    options = lbs.SearchConfig(importance=importance, multi_path=kind == "multi-path")
    return lbs.calibrate(lbs.prepare(model, images, options), [images], bits=4, norms="estimate")


def trainer(kind: str, device: str = "cpu", folder: Path | None = None, bops: float = 0.045, **changes: Any) -> Trainer:
    """Over `STEPS` steps; a search comes to its budget on the way."""
    model, groups, budget = network(kind, changes.pop("importance", "gamma")).to(device), None, None
    if kind in ("search", "multi-path"):
        groups = parameter_groups(model, 0.02, gate_lr=0.05, prune_lr=0.1)
        budget = Budget(model, bops=bops, strength=1.0, read_every=4)
    options = {"epochs": STEPS // 4, "lr": 0.02, "log_every": 5, "checkpoint_seconds": 0.0, **changes}
    return Trainer(
        model,
        lbs.data.train_loader(DATA, 8, seed=5, device=device),
        Recipe(**options),
        phase=kind,
        groups=groups,
        budget=budget,
        teacher=network("float").to(device) if options.get("distill") else None,
        folder=None if folder is None else RunFolder(folder),
    )


def played(kind: str, replays: bool, **changes: Any) -> Trainer:
    """A trainer as on a GPU, its recordings played."""
    made = trainer(kind, **changes)
    for group in made.optimizer.param_groups:
        group |= {"fused": True, "lr": torch.tensor(group["lr"])}
    if replays:
        made._work._recorded = RecordedSteps(made._work._work, made.device)
    return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    graph_of_operations.pretend(monkeypatch)


def state(made: Trainer) -> dict[str, Tensor]:
    momenta = [made.optimizer.state[p].get("momentum_buffer") for p in made.model.parameters()]
    found = {f"momentum {place}": value for place, value in enumerate(momenta) if value is not None}
    return {**made.model.state_dict(), **found, "sums": made._work.sums}


CASES: dict[str, dict[str, Any]] = {
    "float": {},
    "fine-tuning": {"ema": 0.9, "warmup": 1.0, "schedule": "step", "milestones": (3,)},
    "search": {"schedule": "constant"},
    "multi-path": {},
}


MANY = {"amp": "bf16", "distill": 0.5, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *[pytest.param(kind, {}, id=kind) for kind in CASES],
        *[pytest.param(kind, MANY, id=f"{kind}-amp") for kind in ("fine-tuning", "search")],
        *[pytest.param(kind, MANY, id=f"{kind}-amp", marks=pytest.mark.slow) for kind in ("float", "multi-path")],
    ],
)
def test_replays_train_the_same(kind: str, changes: dict[str, Any], tmp_path: Path, gpu: None) -> None:
    folders = {replays: tmp_path / str(replays) for replays in (False, True)}
    made = [played(kind, replays, folder=folder, **CASES[kind], **changes) for replays, folder in folders.items()]
    results = [one.fit() for one in made]
    assert [result.launches for result in results] == ["single", "CUDA graphs"]
    for (name, ours), theirs in zip(state(made[0]).items(), state(made[1]).values(), strict=True):
        assert torch.equal(ours, theirs), name
    if made[0].budget is not None:
        assert made[0].budget.frozen
        assert made[0].budget.steps > 2 * SINGLE_STEPS + 4  # some replays, a look, others
    rows = [[{**row, "seconds": 0} for row in RunFolder(folder).metrics()] for folder in folders.values()]
    assert rows[0] == rows[1]
    assert len(rows[0]) > STEPS // 5


@pytest.mark.parametrize("importance", ["taylor", "activation", pytest.param("magnitude", marks=pytest.mark.slow)])
def test_every_ranking_is_replayed(importance: str, gpu: None) -> None:
    made = [played("search", replays, importance=importance, schedule="constant") for replays in (False, True)]
    for one in made:
        one.fit()
    for (name, ours), theirs in zip(state(made[0]).items(), state(made[1]).values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_loss_that_is_not_finite_is_found_at_the_next_row(gpu: None) -> None:
    made = played("float", True)
    made.fit()
    images, labels = next(iter(made.train))
    for _ in range(4 - made.step % 5):
        made._train_step(images * float("nan"), labels)
    with pytest.raises(TrainingError, match=r"loss of step 2\d .* not finite; the input batch holds NaN"):
        made._train_step(images * float("nan"), labels)


class Work:
    """Stands for a trainer's work; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return images.sum() + labels.sum()


def test_every_kind_of_step_is_recorded_once(gpu: None) -> None:
    work, images, labels = Work(), torch.ones(4, 2), torch.ones(4)
    steps = RecordedSteps(work, images.device)
    for number in range(SINGLE_STEPS):
        assert float(steps(images * number, labels)) == 8 * number + 4
    assert steps.launches == "single"
    for number in range(3):
        assert float(steps(images * number, labels)) == 8 * number + 4
    assert work.calls == SINGLE_STEPS + 1  # once more to be recorded
    assert float(steps(images[:3], labels[:3])) == 9  # an odd batch
    assert float(steps(images, labels, "frozen")) == 12
    assert work.calls == SINGLE_STEPS + 3
    assert steps.launches == "CUDA graphs"


def test_what_cannot_be_recorded_goes_on_step_by_step(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(recorded, "record", refused)
    work = Work()
    steps = RecordedSteps(work, torch.device("cpu"))
    for _ in range(SINGLE_STEPS + 3):
        assert float(steps(torch.ones(4), torch.ones(4))) == 8
    assert work.calls == SINGLE_STEPS + 3
    assert steps.launches == (
        "single: a step could not be recorded (CUDA error: operation not permitted when stream is capturing)"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CASES)
def test_a_gpu_replays_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums on a GPU may come in another order, so only what quantization does not magnify is compared."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    made = [trainer(kind, "cuda", cuda_graphs=graphs, **CASES[kind]) for graphs in (False, True)]
    results = [one.fit() for one in made]
    assert [result.launches for result in results] == ["single", "CUDA graphs"]
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.01 if kind == "float" else 0.3)
    if made[1].budget is not None:
        assert made[1].budget.frozen
        assert made[1].budget.value() <= made[1].budget.target
    if kind == "float":
        for (name, ours), theirs in zip(state(made[0]).items(), state(made[1]).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
def test_a_step_that_waits_cannot_be_recorded_on_a_gpu() -> None:
    weight = torch.ones(4, device="cuda")

    def work(images: Tensor, labels: Tensor) -> Tensor:
        weight.add_(1)
        return images.sum() if float(labels.sum()) else images.mean()

    steps = RecordedSteps(work, weight.device)
    for number in range(SINGLE_STEPS + 3):
        assert float(steps(torch.ones(4, device="cuda"), torch.ones(4, device="cuda"))) == 4
        assert float(weight[0]) == 2 + number
    assert steps.launches.startswith("single: a step could not be recorded")
    assert 0 <= float(torch.rand((), device="cuda")) < 1  # random numbers are still to be had
