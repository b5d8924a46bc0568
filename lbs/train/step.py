"""One training step as the device sees it: losses, gradients, optimizer, thresholds. Nothing is read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbs.recipe import Recipe
from lbs.train import distributed
from lbs.train.protocols import BudgetTerm
from lbs.train.recorded import RecordedSteps
from lbs_kernels.errors import DataError, TrainingError


class Losses(nn.Module):
    """Images and labels to (loss with the budget term, task loss, logits) in one forward pass.

    DistributedDataParallel must see all that gets a gradient, and the budget reaches thresholds that logits do not.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, classes: int, teacher: nn.Module | None, budget: BudgetTerm | None
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.classes = model, recipe, classes
        self.budget = budget
        self._teacher = [] if teacher is None else [teacher]  # in a list: none of its weights are trained

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.amp == "bf16"):
            logits = self.model(images)
            if logits.shape[-1] < self.classes:
                raise DataError(
                    f"the model gives {logits.shape[-1]} classes, the training labels go up to "
                    f"{self.classes - 1}; give a model of {self.classes} classes"
                )
            task = self._task(logits.float(), labels, images)
        return task if self.budget is None else task + self.budget(), task, logits

    def _task(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        recipe = self.recipe
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if not self._teacher:
            return loss
        with torch.no_grad():
            target = F.log_softmax(self._teacher[0](images).float() / recipe.temperature, 1)
        soft = F.kl_div(F.log_softmax(logits / recipe.temperature, 1), target, reduction="batchmean", log_target=True)
        return (1 - recipe.distill) * loss + recipe.distill * recipe.temperature**2 * soft


class TrainingStep:
    """SGD on the losses of a batch, launched operation by operation or, where a GPU allows, as a recording.

    Arguments as of `Trainer`; `model` is on its device already.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        classes: int,
        groups: list[dict[str, Any]] | None = None,
        teacher: nn.Module | None = None,
        budget: BudgetTerm | None = None,
    ) -> None:
        if recipe.distill and teacher is None:
            raise TrainingError(f"distill={recipe.distill} needs a teacher; give the float model, or distill=0")
        self.model, self.budget = model, budget
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        followed = teacher.to(self.device).eval() if recipe.distill and teacher is not None else None
        self._losses: nn.Module = Losses(model, recipe, classes, followed, budget)
        self.optimizer = torch.optim.SGD(
            groups or default_groups(model, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=True, fused=on_gpu
        )
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # Sums on the device since the last row (row 0) and since the epoch began (row 1): loss, task loss, correct.
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=self.device)
        if distributed.active():
            # Idle gates get no gradient, hence find_unused.
            self._losses = distributed.wrap(self._losses, find_unused=budget is not None)
        self._recorded: RecordedSteps | None = None
        if on_gpu and recipe.cuda_graphs and not distributed.active():
            self._recorded = RecordedSteps(self._work, self.device)
        if on_gpu:  # rates that recorded steps read where they are
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=self.device)

    @property
    def launches(self) -> str:
        """`single` or `CUDA graphs`, or why those were not to be had."""
        return "single" if self._recorded is None else self._recorded.launches

    @property
    def loss_is_at_hand(self) -> bool:
        """Whether looking at a loss costs nothing, and comes before the weights have followed it."""
        return self._recorded is None and self.device.type == "cpu"

    @property
    def rate(self) -> float:
        """Of the first group, before the curve's factor."""
        return self._rates[0]

    def set_rates(self, factor: float) -> None:
        """What every group's rate is multiplied by from now on."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def __call__(self, images: Tensor, labels: Tensor, check: Callable[[Tensor], None] | None = None) -> None:
        """Train on a batch on the device. check: given the loss, before the weights move unless steps are recorded."""
        if self._recorded is None:
            self._work(images, labels, check)
            return
        loss = self._recorded(images, labels, self.budget.side if self.budget is not None else "")
        if check is not None:
            check(loss)

    def _work(self, images: Tensor, labels: Tensor, check: Callable[[Tensor], None] | None = None) -> Tensor:
        """All that is launched; returns the loss."""
        loss, task, logits = self._losses(images, labels)
        if check is not None:
            check(loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.device.type == "cuda":
            self._align_gradients()
        self.optimizer.step()
        if self.budget is not None:
            self.budget.clamp()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            # Of all processes in every step: a checkpoint, which rank 0 writes alone, must hold what belongs to all.
            self.sums += distributed.reduce_mean(torch.stack([loss.double(), task.double(), correct.double()]))
        return loss.detach()

    def _align_gradients(self) -> None:
        """The fused optimizer asks for the parameters' strides; autograd is free in dimensions of size one."""
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def default_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Weights decay; norms, biases and ranges do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": recipe.lr, "weight_decay": 0.0},
    ]
