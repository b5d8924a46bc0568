"""Recipe: the numbers of one training phase, and the learning-rate curve they draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbs_kernels.errors import TrainingError

CURVES = ("cosine", "step", "constant")
AMP = ("off", "bf16")


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, one learning-rate factor for all parameter groups.

    schedule: `cosine` to 0 over all steps, `step` divides by 10 at each epoch of `milestones`, `constant`.
    full_epochs: the length `milestones` were written for (0: `epochs`); they move in proportion with `epochs`.
    minutes: the curve, and the phase, end with the epochs or with these minutes of training, whichever comes first (0:
    no limit). A run with a limit depends on the clock, so it is not repeated bit for bit.
    warmup: epochs of linear rise. amp: `bf16` runs the network under autocast; evaluation is always in float32.
    distill: weight 0..1 of the loss against a teacher's logits softened by `temperature`; the rest is the labels'.
    cuda_graphs: on a GPU, steps are recorded and replayed as a whole (lbs/train/recorded.py), where that is possible.
    ema: what is measured and kept is the running average of the weights, of this decay (0: the weights themselves).
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    full_epochs: int = 0
    minutes: float = 0.0
    warmup: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    ema: float = 0.0
    amp: str = "off"
    cuda_graphs: bool = True
    log_every: int = 50
    eval_every: int = 1
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        rules = (
            ("epochs", self.epochs >= 0, "0 or more"),
            ("lr", self.lr > 0 and math.isfinite(self.lr), "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("schedule", self.schedule in CURVES, f"one of {', '.join(CURVES)}"),
            ("milestones", all(m > 0 for m in self.milestones), "epochs above 0"),
            ("full_epochs", self.full_epochs >= 0, "0 or more"),
            ("minutes", self.minutes >= 0, "0 (no limit) or more"),
            ("warmup", self.warmup >= 0, "0 or more epochs"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("distill", 0 <= self.distill <= 1, "in [0, 1]"),
            ("temperature", self.temperature > 0, "above 0"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("amp", self.amp in AMP, f"one of {', '.join(AMP)}"),
            ("log_every", self.log_every >= 1, "1 or more"),
            ("eval_every", self.eval_every >= 1, "1 or more"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise TrainingError(f"{name}={getattr(self, name)!r}; it must be {rule}")

    def share(self, step: int, steps_per_epoch: int, seconds: float = 0.0) -> float:
        """How much of the phase lies behind 0-based step `step`, 0..1; at 1 it is over."""
        steps = self.epochs * steps_per_epoch
        done = step / steps if steps else 1.0
        return min(1.0, max(done, seconds / (60 * self.minutes)) if self.minutes else done)

    def lr_factor(self, step: int, steps_per_epoch: int, seconds: float = 0.0) -> float:
        """What every group's learning rate is multiplied by in 0-based step `step`, `seconds` after the start.

        >>> [round(Recipe(epochs=2, lr=0.1).lr_factor(s, 2), 3) for s in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        >>> shortened = Recipe(epochs=10, lr=0.1, schedule="step", milestones=(80, 120), full_epochs=200)
        >>> [round(shortened.lr_factor(epoch, 1), 3) for epoch in (3, 4, 5, 6)]
        [1.0, 0.1, 0.1, 0.01]
        """
        share = self.share(step, steps_per_epoch, seconds)
        rise = min(1.0, (step + 1) / (self.warmup * steps_per_epoch)) if self.warmup else 1.0
        if self.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * share))
        if self.schedule == "step":
            length = self.full_epochs or self.epochs
            # In whole steps where no clock is involved: 0.4 * 200 must not fall short of 80 by a rounding.
            passed = share * length if self.minutes else step * length / (self.epochs * steps_per_epoch)
            return float(rise * 0.1 ** sum(passed >= milestone for milestone in self.milestones))
        return rise
