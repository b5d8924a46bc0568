"""What each of two processes does in test_search_distributed.py; started with RANK, WORLD_SIZE and MASTER_PORT set.

    python two_processes.py FOLDER

Rank 0 writes FOLDER/answers-0.json, rank 1 FOLDER/answers-1.json; what is asserted stands in the test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lbs.data
from lbs.quant import calibrate
from lbs.quant.codec import SIGNED
from lbs.recipe import Recipe
from lbs.run_folder import RunFolder
from lbs.search import Budget, SearchConfig, parameter_groups, prepare
from lbs.search.bit_sharing import gated
from lbs.search.gates import BitGate
from lbs.train import distributed
from lbs.train.trainer import Trainer
from lbs_kernels.errors import LbsError

DATA = lbs.data.synthetic(classes=4, train=48, test=21, size=8, channels=1, seed=3)


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
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class KilledError(Exception):
    """Stands for the end of the process."""


def make(folder: Path | None, kill_at: int | None = None, augment: bool = True) -> Trainer:
    """A search as a fresh process would build it; its gates move within the first epoch."""
    torch.manual_seed(7)
    model = prepare(Small(), torch.zeros(1, 1, 8, 8), SearchConfig(group_size=2))
    batches = [x for x, _ in lbs.data.train_loader(DATA, 16, augment=False)]
    calibrate(model, batches)
    own = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    trainer = Trainer(
        model,
        lbs.data.train_loader(DATA, 8, seed=5, augment=augment, **own),
        Recipe(epochs=2, lr=0.05, log_every=2, checkpoint_seconds=0.0),
        phase="search",
        test=lbs.data.eval_loader(DATA, 8, **own),
        groups=parameter_groups(model, 0.05, gate_lr=0.05, prune_lr=0.1),
        budget=Budget(model, bops=0.05, strength=1.0, gain=0.01),
        folder=RunFolder(folder) if folder else None,
    )
    if kill_at is not None:
        step = trainer._train_step

        def counted(images: torch.Tensor, labels: torch.Tensor) -> None:
            if trainer.step == kill_at:
                raise KilledError
            step(images, labels)

        trainer._train_step = counted  # type: ignore[method-assign]
    return trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Everything the ranks must agree on."""
    result = trainer.fit(resume=False)
    return {**state(trainer), "loss": result.loss, "accuracy": result.accuracy, "best": result.best_accuracy}


def state(trainer: Trainer) -> dict[str, Any]:
    return {"digests": trainer._digests(), "step": trainer.step}


def complaint(call: Callable[[], object]) -> str:
    """The error a call ends with."""
    try:
        call()
    except LbsError as error:
        return str(error)
    return "no error"


def statistics_of_halves() -> list[list[float]]:
    """[of this rank's half, reduced; of the whole batch]: the middle gate closes on the whole, not on rank 0's half."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x[:4] *= 0.05
    gate = BitGate((2, 4, 8))
    with torch.no_grad():
        gate.alpha[0] = 0.02
    own = x[distributed.rank() * 4 :][:4]
    v = torch.tensor(1.0)

    def seen(images: torch.Tensor) -> list[float]:
        gated(images, v, gate, SIGNED)
        return gate.statistic.tolist()

    with distributed.alone():
        whole = seen(x)
    return [seen(own), whole]


def poisoned(folder: Path, at: int, value: float) -> Trainer:
    """Rank 1 adds `value` to one weight behind step `at`, 0: before the first."""
    trainer = make(folder)
    step = trainer._train_step

    def alter() -> None:
        if trainer.step == at and distributed.rank() == 1:
            with torch.no_grad():
                trainer.model.conv1.weight[0, 0, 0, 0] += value  # type: ignore[union-attr,index,operator]

    def altered(images: torch.Tensor, labels: torch.Tensor) -> None:
        step(images, labels)
        alter()

    alter()
    trainer._train_step = altered  # type: ignore[method-assign]
    return trainer


def fail() -> None:
    raise LbsError("a file is missing")


def main(folder: Path) -> None:
    distributed.start(torch.device("cpu"))
    rank = distributed.rank()
    answers: dict[str, Any] = {"whole": outcome(make(folder / "whole"))}
    try:
        make(folder / "parts", kill_at=9).fit()
    except KilledError:
        distributed.wait()
    resumed = make(folder / "parts")
    result = resumed.fit(resume=True)
    answers["resumed"] = {
        **state(resumed),
        "loss": result.loss,
        "accuracy": result.accuracy,
        "best": result.best_accuracy,
    }
    answers["statistics"] = statistics_of_halves()
    answers["disagreement"] = complaint(poisoned(folder / "apart", 6, 1e-6).fit)
    answers["start"] = complaint(poisoned(folder / "unlike", 0, 1e-6).fit)
    answers["not finite"] = complaint(poisoned(folder / "nan", 2, float("nan")).fit)
    answers["first"] = complaint(lambda: distributed.first(fail))
    answers["uneven"] = complaint(lambda: lbs.data.train_loader(DATA, 9, rank=rank, world_size=2))
    (folder / f"answers-{rank}.json").write_text(json.dumps(answers))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
