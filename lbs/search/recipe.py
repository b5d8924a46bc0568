"""Recipe: the numbers of one training phase, and the learning-rate curve they draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbs_kernels.errors import TrainingError

SCHEDULES = ("cosine", "step", "constant")
AMP = ("off", "bf16")


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum .9, one learning-rate factor for all parameter groups.

    schedule: `cosine` to 0 over all steps, `step` divides by 10 at each epoch of `milestones`, `constant`.
    warmup: epochs of linear rise. amp: `bf16` runs the network under autocast; evaluation is always in float32.
    distill: weight 0..1 of the loss against a teacher's logits softened by `temperature`; the rest is the labels'.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    amp: str = "off"
    log_every: int = 50
    eval_every: int = 1
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        rules = (
            ("epochs", self.epochs >= 0, "0 or more"),
            ("lr", self.lr > 0 and math.isfinite(self.lr), "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("warmup", self.warmup >= 0, "0 or more epochs"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("distill", 0 <= self.distill <= 1, "in [0, 1]"),
            ("temperature", self.temperature > 0, "above 0"),
            ("amp", self.amp in AMP, f"one of {', '.join(AMP)}"),
            ("log_every", self.log_every >= 1, "1 or more"),
            ("eval_every", self.eval_every >= 1, "1 or more"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise TrainingError(f"{name}={getattr(self, name)!r}; it must be {rule}")

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """What every group's learning rate is multiplied by in 0-based step `step`.

        >>> [round(Recipe(epochs=2, lr=0.1).lr_factor(s, 2), 3) for s in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        """
        epoch = step / steps_per_epoch
        rise = min(1.0, (step + 1) / (self.warmup * steps_per_epoch)) if self.warmup else 1.0
        if self.schedule == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        if self.schedule == "step":
            return float(rise * 0.1 ** sum(epoch >= milestone for milestone in self.milestones))
        return rise
