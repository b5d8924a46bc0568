"""What a budget reached, beside what it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from lbs.search.quantities import Quantity

TOLERANCE = 0.03  # a result this far below its target is near enough


@dataclass(frozen=True)
class Reached:
    """One quantity: its target, what was reached, and the smallest step that opening anything more would take.

    thresholds: what the trained thresholds had reached before the projection; None where none were trained.
    """

    quantity: Quantity
    target: float
    value: float
    step: float
    thresholds: float | None = None

    @property
    def met(self) -> bool:
        """Whether the result is at most the target."""
        return self.value <= self.target

    @property
    def near(self) -> bool:
        """Whether it is also within 3 % of it."""
        return self.met and self.value >= (1 - TOLERANCE) * self.target

    def __str__(self) -> str:
        show, state = self.quantity.show, "met" if self.met else "MISSED"
        text = f"{self.quantity.name}: target {show(self.target)}, result {show(self.value)} "
        text += f"({self.value / self.target:.1%}), {state}"
        text += ", by running minima of measured times" if self.quantity.measured else ""
        if self.thresholds is not None:
            text += f"; thresholds reached {show(self.thresholds)}" + self._rest()
        if self.met and not self.near:
            rest = self.target - self.value
            text += f"; {show(rest)} are left, " + (
                f"less than the smallest step of these gates, {show(self.step)}"
                if self.step > rest
                else "everything is open"
                if not self.step
                else "another target forbids more"
            )
        return text

    def _rest(self) -> str:
        if self.thresholds is None or self.thresholds == self.value:
            return ""
        return f", projection {'closed' if self.thresholds > self.value else 'opened'} the rest"


@dataclass(frozen=True)
class BudgetResult:
    """Targets and what was reached, of one image. `target` and `value` are those of the first quantity.

    uncounted: layers that stay in float, whose cost is part of neither; float_bops: what those of them that are
    called, and have a formula, cost at 32 x 32 bits.
    """

    reached: tuple[Reached, ...]
    full_precision: int
    uncounted: tuple[str, ...] = ()
    float_bops: int = 0

    @property
    def target(self) -> float:
        return self.reached[0].target

    @property
    def value(self) -> float:
        return self.reached[0].value

    @property
    def met(self) -> bool:
        """Whether every target holds."""
        return all(row.met for row in self.reached)

    def __str__(self) -> str:
        rows = [str(row) for row in self.reached]
        if self.uncounted:
            counted = f" ({self.float_bops:,} bit operations at 32 x 32 bits)" if self.float_bops else ""
            rows.append(f"not counted, in float: {', '.join(self.uncounted)}{counted}")
        return "budget " + "\n       ".join(rows)
