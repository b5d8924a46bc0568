"""Trainer: the loop of every phase (float training, search, fine-tuning), resumable after a kill at any step.

A step launches work and reads nothing back from the device; losses are summed there and read every `log_every` steps.
On the CPU, where reading is free, every loss is checked. Of several processes (`lbs.train.distributed`) each takes its
part of every batch; they are compared at the end of each epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbs.data import Loader
from lbs.recipe import Recipe
from lbs.run_folder import RunFolder
from lbs.train import checkpoint, distributed, stopping
from lbs.train.average import Average
from lbs.train.evaluation import evaluate
from lbs.train.nonfinite import finite_weights, first_nonfinite
from lbs.train.protocols import BudgetTerm, Progress
from lbs.train.step import TrainingStep
from lbs_kernels.errors import CheckpointError, TrainingError


@dataclass(frozen=True)
class TrainResult:
    """What a phase reached. Accuracies are test top-1 in 0..1, None where there was no test set."""

    phase: str
    epochs: int
    steps: int
    loss: float
    accuracy: float | None  # of the last epoch: the weights that are kept
    best_accuracy: float | None
    best_epoch: int | None
    seconds: float  # of this and the resumed sessions
    launches: str = "single"  # or `CUDA graphs`, or why those were not to be had

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Trainer:
    """Trains `model` in place by `recipe`.

    Arguments:
        model: on its device already. train, test: loaders; without `test` no accuracy is measured.
        groups: parameter groups for SGD, each with its own lr (`search.parameter_groups`); without them all parameters
            share the recipe's, and only tensors of two or more dimensions decay.
        budget: added to the loss, stepped after each optimizer step. teacher: float model to distil from.
        folder: where metrics and checkpoints go; without it nothing is written. observe: returns what a log row of
            the search shows besides the loss (bops, lambda, gates); called only when a row is written.
        stop: asked after each step whether the phase has reached its goal; it must not wait for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Loader,
        recipe: Recipe,
        *,
        phase: str,
        test: Iterable[tuple[Tensor, Tensor]] | None = None,
        groups: list[dict[str, Any]] | None = None,
        budget: BudgetTerm | None = None,
        teacher: nn.Module | None = None,
        folder: RunFolder | None = None,
        progress: Progress | None = None,
        observe: Callable[[], dict[str, Any]] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        if recipe.ema and budget is not None:
            raise TrainingError(f"ema={recipe.ema}: a search goes by the weights as they are; average in fine-tuning")
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(model.parameters()).device
        self.train, self.test, self.recipe, self.phase = train, test, recipe, phase
        self.budget, self.folder, self.progress = budget, folder, progress
        self.observe, self.stop = observe, stop
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self._work = TrainingStep(self.model, recipe, train.classes, groups, teacher, budget)
        self.optimizer = self._work.optimizer
        self.epoch = self.step = 0
        self.finished = False
        self.best: tuple[float, int] | None = None
        self.accuracy: float | None = None
        self.loss = float("nan")
        self._seconds = 0.0
        self._lr_factor = 1.0
        self._images = torch.zeros((), dtype=torch.float32)  # the latest batch, to look for the layer that broke
        self._seen = [0, 0, 0, 0]  # window steps, window images, epoch steps, epoch images

    def fit(self, resume: bool = False) -> TrainResult:
        """Train to the end of the recipe, or until SIGTERM or Ctrl-C asks for an end: then to that of the step, saved.

        Raises:
            TrainingError: the loss is not finite (the layer is named; the last checkpoint stays as it was), or another
                process does not answer. Stopped: an end was asked for; a KeyboardInterrupt.
            CheckpointError: nothing to resume from, or the disk is full.
        """
        with stopping.noted() as request, distributed.answered():
            return self._fit(resume, request)

    def _fit(self, resume: bool, request: stopping.Request) -> TrainResult:
        if resume:
            self.load()
        elif self.folder:
            self.folder.keep_metrics(self.phase, 0)
        started = time.monotonic() - self._seconds
        saved = time.monotonic()
        if self.progress:
            self.progress.begin(self.phase, self.recipe.epochs * len(self.train), self.step)
        if distributed.active():
            distributed.check_agreement(self._digests(), trained=self.step > 0)
        while self.epoch < self.recipe.epochs and not self.finished:
            self.model.train()
            for images, labels in self.train:
                self._train_step(images, labels)
                if self.progress:
                    self.progress.advance(1)
                self._seconds = time.monotonic() - started
                self.finished = self._over() or (self.stop is not None and self.stop())
                if self.finished:
                    break
                at_end = self.step % len(self.train) == 0
                if not at_end and distributed.asked(request.number > 0):
                    self._leave(request)
                if not at_end and time.monotonic() - saved >= self.recipe.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            self._end_epoch()
            self._seconds = time.monotonic() - started
            self.save()
            saved = time.monotonic()
            if distributed.asked(request.number > 0):  # behind the last epoch too: another phase may follow
                self._leave(request)
        if self.average is not None:
            self.model.load_state_dict(self.kept.state_dict())
        if self.progress:
            self.progress.end()
        best_accuracy, best_epoch = self.best or (None, None)
        return TrainResult(
            self.phase,
            self.epoch,
            self.step,
            self.loss,
            self.accuracy,
            best_accuracy,
            best_epoch,
            self._seconds,
            self._work.launches,
        )

    def _leave(self, request: stopping.Request) -> None:
        """Save and raise Stopped."""
        self.save()
        distributed.wait()
        where = "nothing is kept, there is no run folder"
        if self.folder is not None:
            where = f"saved in {self.folder.checkpoint(self.phase)}; go on with resume=True"
        if self.progress:
            self.progress.end()
        raise stopping.Stopped(
            f"{self.phase}: stopped by {request.name} after step {self.step}, {where}", request.number
        )

    @property
    def kept(self) -> nn.Module:
        """The network that is measured, and that `model` holds in the end."""
        return self.model if self.average is None else self.average.model

    def _over(self) -> bool:
        """Whether the minutes are used up; all processes go by the clock of rank 0."""
        if self.recipe.minutes:
            self._seconds = distributed.first(lambda: self._seconds, in_step=True)
        return self.recipe.minutes > 0 and self.recipe.share(self.step, len(self.train), self._seconds) >= 1

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        self._lr_factor = self.recipe.lr_factor(self.step, len(self.train), self._seconds)
        self._work.set_rates(self._lr_factor)
        images = self._images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        log = (self.step + 1) % self.recipe.log_every == 0
        self._work(images, labels, self._require_finite if log or self._work.loss_is_at_hand else None)
        if self.budget is not None:
            self.budget.advance()
        if self.average is not None:
            self.average.follow(self.step)
        self.step += 1
        self._seen = [old + new for old, new in zip(self._seen, (1, len(labels), 1, len(labels)), strict=True)]
        if log:
            self._write_step()

    def _require_finite(self, loss: Tensor) -> None:
        if distributed.anywhere(not bool(loss.isfinite()), self.device):
            self._stop()

    def _stop(self) -> None:
        """Raise, on every process, with the place that one of them found."""
        with distributed.alone():
            own = first_nonfinite(self.model, self._images)
        reasons = distributed.gather(own)
        broken = [(number, text) for number, text in enumerate(reasons) if not text.startswith("no layer")]
        where = f"on rank {broken[0][0]}: {broken[0][1]}" if broken and len(reasons) > 1 else own
        raise self._not_finite(where)

    def _not_finite(self, where: str) -> TrainingError:
        kept = ""
        if self.folder and self.folder.checkpoint(self.phase).exists():
            kept = f"; the last good checkpoint is {self.folder.checkpoint(self.phase)}"
        return TrainingError(
            f"{self.phase}: the loss of step {self.step} (epoch {self.epoch}) is not finite; {where}{kept}. "
            f"Lower lr={self.recipe.lr:g} and start in a new run folder: this one goes on as it began"
        )

    def _write_step(self) -> None:
        sums = self._work.sums[0].tolist()
        steps, images = self._seen[:2]
        row: dict[str, Any] = {
            "phase": self.phase,
            "kind": "step",
            "step": self.step,
            "epoch": (self.step - 1) // len(self.train),
            "loss": sums[0] / steps,
            "task_loss": sums[1] / steps,
            "train_accuracy": sums[2] / images,
            "lr": self._work.rate * self._lr_factor,
            "seconds": round(self._seconds, 3),
        }
        self._record(row)
        self._work.sums[0] = 0
        self._seen[:2] = [0, 0]

    def _end_epoch(self) -> None:
        sums = self._work.sums[1].tolist()
        steps, images = self._seen[2:]
        self.loss = sums[0] / steps
        if distributed.anywhere(not self.loss < float("inf") or not finite_weights(self.model), self.device):
            self._stop()
        distributed.share_norms(self.model)
        if self.average is not None:
            distributed.share_norms(self.average.model)
        if distributed.active():
            distributed.check_agreement(self._digests())
        self.epoch += 1
        last = self.finished or self.epoch == self.recipe.epochs
        measured = self.test is not None and (last or self.epoch % self.recipe.eval_every == 0)
        if measured and self.test is not None:
            self.accuracy = evaluate(self.kept, self.test)
            if self.best is None or self.accuracy > self.best[0]:
                self.best = (self.accuracy, self.epoch)
                if self.folder:
                    checkpoint.save_weights(self.folder.best(self.phase), self.kept)
        row = {
            "phase": self.phase,
            "kind": "epoch",
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "task_loss": sums[1] / steps,
            "train_accuracy": sums[2] / images,
            "test_accuracy": self.accuracy if measured else None,
            "lr": self._work.rate * self._lr_factor,
            "seconds": round(self._seconds, 3),
        }
        self._record(row)
        self._work.sums[1] = 0
        self._seen[2:] = [0, 0]

    def _digests(self) -> dict[str, str]:
        """What must be equal on all processes after an epoch: weights, gates, ranges, momentum, budget."""
        tensors = {
            **self.model.state_dict(),
            **_prefixed("average of", self._average()),
            **_prefixed("momentum of", checkpoint.optimizer_tensors(self.optimizer, self.model)),
        }
        found = {name: checkpoint.digest({name: value.detach().cpu()}) for name, value in tensors.items()}
        if self.budget is not None:
            found["budget"] = str(sorted(self.budget.state_dict().items()))
        if self.observe is not None:
            found |= {f"plan ({key})": str(value) for key, value in self.observe().items()}
        return found

    def _average(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.model.state_dict()

    def _record(self, row: dict[str, Any]) -> None:
        if self.observe is not None:
            row |= self.observe()
        if self.folder:
            self.folder.append_metrics(row)
        if self.progress:
            self.progress.note(row)

    def save(self) -> None:
        """Write all that the next step depends on, unless a weight is not finite. Nothing without a folder.

        Of several processes only the first writes; what differs between them (norms' running statistics inside an
        epoch, random state) is its own.
        """
        if self.folder is None or distributed.rank() > 0:
            return
        if not finite_weights(self.model):
            with distributed.alone():
                raise self._not_finite(first_nonfinite(self.model, self._images))
        tensors = {
            **_prefixed("model", self.model.state_dict()),
            **_prefixed("average", self._average()),
            **_prefixed("momentum", checkpoint.optimizer_tensors(self.optimizer, self.model)),
            **_prefixed("random", checkpoint.random_tensors()),
            "sums": self._work.sums,
        }
        state = {
            "phase": self.phase,
            "epoch": self.epoch,
            "step": self.step,
            "finished": self.finished,
            "seen": self._seen,
            "best": self.best,
            "accuracy": self.accuracy,
            "loss": self.loss if self.loss == self.loss else None,
            "seconds": self._seconds,
            "loader": self.train.state_dict(),
            "budget": self.budget.state_dict() if self.budget is not None else None,
        }
        checkpoint.save(self.folder.checkpoint(self.phase), tensors, state)

    def load(self) -> None:
        """Go on where `save` was. Raises CheckpointError or TrainingError where the file does not fit."""
        if self.folder is None:
            raise CheckpointError("there is no run folder to resume from; give folder=")
        path = self.folder.checkpoint(self.phase)
        tensors, state = checkpoint.load(path)
        if state.get("phase") != self.phase:
            raise CheckpointError(f"{path} is of the phase {state.get('phase')!r}, not {self.phase!r}")
        checkpoint.apply_weights(self.model, _below("model", tensors), path)
        if self.average is not None:
            checkpoint.apply_weights(self.average.model, _below("average", tensors), path)
        checkpoint.restore_optimizer(self.optimizer, self.model, _below("momentum", tensors))
        self.train.load_state_dict(state["loader"])
        if self.budget is not None:
            with torch.no_grad():
                self.budget.load_state_dict(state["budget"])
        self.epoch, self.step, self.finished = state["epoch"], state["step"], state["finished"]
        self._seen = list(state["seen"])
        self.best = (state["best"][0], state["best"][1]) if state["best"] else None
        self.accuracy, self._seconds = state["accuracy"], state["seconds"]
        self.loss = float("nan") if state["loss"] is None else state["loss"]
        self._work.sums.copy_(tensors["sums"])
        self.folder.keep_metrics(self.phase, self.step)
        checkpoint.restore_random(_below("random", tensors))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + "/")}
