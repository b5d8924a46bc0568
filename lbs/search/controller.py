"""The weight of one cost term: proportional and integral control of lambda towards a target."""

from __future__ import annotations

import math


class Controller:
    """lambda = I * (1 - p + p * e) while above the target, 0 once it is met; e = log(value / target) / span, at most 1.

    I starts at `strength` and grows by the factor 1 + gain * e a step (the integral part, in log lambda). Proportional
    control alone droops: it stops short of the target where its pressure balances the task. Integral control alone
    overshoots, because its pressure is largest at the hit. Both together, with all gates frozen at the first hit
    (`Budget`), ease off on the way and still arrive.

    span: log(value / target) at the start where that is below 1, as of milliseconds, of which few networks can lose two
    thirds. A short way is to take as many steps as a long one; without the span lambda grew by half in the steps in
    which it triples on the way to 1.5 % of the bit operations, and no threshold moved.
    """

    def __init__(self, strength: float, gain: float, proportion: float = 0.5, span: float = 1.0) -> None:
        self.integral, self.gain, self.proportion, self.span = strength, gain, proportion, span
        self.excess = 1.0

    @property
    def strength(self) -> float:
        """The present lambda."""
        return self.integral * (1 - self.proportion * (1 - self.excess)) if self.excess > 0 else 0.0

    def update(self, value: float, target: float, steps: int = 1) -> None:
        """Take in what `steps` more steps have led to."""
        self.excess = min(1.0, max(0.0, math.log(value / target) / self.span))
        self.integral *= (1 + self.gain * self.excess) ** steps
