"""What a budget can count: bit operations, bytes of packed weights, seconds; one small class, three of its objects.

A quantity prices one layer under hard gates. Everything differentiable follows from prices alone (`budget.py`): the
increments between neighbouring widths, and the slope between neighbouring numbers of filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, runtime_checkable

from lbs import cost
from lbs.plan import Plan
from lbs_kernels.errors import PlanError
from lbs_kernels.program.problem import Problem


@runtime_checkable
class Estimates(Protocol):
    """A table of measured times."""

    def estimate(self, problem: Problem) -> float | None:
        """Seconds of one step, None where nothing is known."""
        ...


LookUp = Callable[[Problem], float | None]


@runtime_checkable
class NetworkTimes(Protocol):
    """A table that also knows what surrounds the steps in a call, such as `lbs.cost.Tuned`."""

    def of_network(self, layers: Sequence[Problem]) -> tuple[LookUp, float]:
        """(Seconds of a step, seconds of a call that no step takes), of a network's layers, whole, as executed."""
        ...


Table = LookUp | Estimates | NetworkTimes


@dataclass(frozen=True)
class Quantity:
    """name and unit are for people: value / scale is what they read. price: exact cost of a layer.

    constant: what the network costs beside its layers. measured: prices are measurements, with their noise; a search
    reads them so that nothing narrower costs more (`lbs/search/ledger.py`). modelled: what model was asked instead of a
    measurement, "" for what was counted or measured.
    """

    name: str
    unit: str
    scale: float
    price: Callable[[Problem], float]
    constant: float = 0.0
    measured: bool = False
    modelled: str = ""

    def show(self, value: float) -> str:
        """For people: `630.6M BOPs`."""
        return f"{value / self.scale:.1f}{self.unit}" if value >= self.scale else f"{value / self.scale:.3g}{self.unit}"

    def show_enough(self, value: float) -> str:
        """As `show`, with five digits and rounded up: a target of what is shown is enough for `value`.

        >>> bit_operations().show_enough(612_345_678), bit_operations().show_enough(1_500_000)
        ('612.35M BOPs', '1.5000M BOPs')
        """
        amount = value / self.scale
        places = max(0, 4 - math.floor(math.log10(amount))) if amount > 0 else 0
        return f"{math.ceil(amount * 10**places) / 10**places:.{places}f}{self.unit}"


def bit_operations() -> Quantity:
    """Bit operations of one image (LBS section 3.3)."""
    return Quantity("bops", "M BOPs", 1e6, cost.bops)


def packed_bytes() -> Quantity:
    """Bytes of the packed weights: planes, multiplier and bias; float layers (32 bits) count four bytes a weight."""

    def price(problem: Problem) -> float:
        full = problem.w_bits == cost.FULL_PRECISION_BITS
        return cost.float_weight_bytes(problem) if full else cost.weight_bytes(problem)

    return Quantity("size_mb", " MB", 1e6, price)


def seconds(table: Table, plan: Plan | None = None) -> Quantity:
    """Measured latency of one image: the sum of the layers' times in `table`, and what surrounds them in a call.

    A table is a function, or an object whose method `estimate` is one; what surrounds the layers is counted where it is
    a `NetworkTimes`, for the network of the plan. A size it does not know lies on the line between the nearest numbers
    of filters it does know. A table of modelled times says so (`modelled`), as the quantity then does.
    """
    owner = getattr(table, "__self__", table)  # the table that `table.estimate` is a method of
    mark = str(getattr(owner, "modelled", ""))
    look_up: LookUp
    constant = 0.0
    if isinstance(table, NetworkTimes):
        if plan is None:
            raise PlanError("a table of calls needs the plan of the network whose calls they are; give plan=")
        look_up, constant = table.of_network(plan.whole_problems())
    else:
        look_up = table.estimate if isinstance(table, Estimates) else table

    @cache
    def of_step(problem: Problem) -> float:
        known = look_up(problem)
        return float(known) if known is not None else _between(look_up, problem)

    def price(problem: Problem) -> float:
        return sum(map(of_step, cost.timed(problem)))

    unit = f" ms ({mark})" if mark else " ms"
    return Quantity("latency_ms", unit, 1e-3, price, constant, measured=not mark, modelled=mark)


def _between(table: LookUp, problem: Problem) -> float:
    """Linear between the nearest numbers of filters that the table knows; beyond them in proportion to the nearest.

    Raises:
        PlanError: the table knows no number of filters of this layer at all.
    """
    count = problem.out_channels
    lower = _nearest(table, problem, range(count - 1, 0, -1))
    upper = _nearest(table, problem, range(count + 1, 2 * count + 65))
    if lower is not None and upper is not None:
        share = (count - lower[0]) / (upper[0] - lower[0])
        return lower[1] + share * (upper[1] - lower[1])
    found = lower or upper
    if found is None:
        raise PlanError(
            f"the latency table has no time for {problem}, whatever the number of filters; measure this layer first, "
            "or give a table that estimates"
        )
    return found[1] * count / found[0]


def _nearest(table: LookUp, problem: Problem, counts: range) -> tuple[int, float] | None:
    """The first number of filters with a known time, and that time."""
    for count in counts:
        other = replace(problem, out_channels=count)
        known = table(replace(other, in_channels=count, groups=count) if problem.depthwise else other)
        if known is not None:
            return count, float(known)
    return None


@dataclass(frozen=True)
class Target:
    """A quantity and the most it may be."""

    quantity: Quantity
    limit: float


def targets_of(
    plan: Plan, bops: float | None, size_mb: float | None, latency_ms: float | None, table: Table | None
) -> tuple[Target, ...]:
    """The limits a user asked for of the network of a plan, in base units.

    Raises:
        PlanError: none, one that is no positive number, or a latency without a table.
    """
    asked = {"bops": bops, "size_mb": size_mb, "latency_ms": latency_ms}
    for name, limit in asked.items():
        if limit is not None and not (isinstance(limit, int | float) and math.isfinite(limit) and limit > 0):
            rule = "a fraction of full precision in (0, 1], or bit operations of one image"
            raise PlanError(f"budget {name}={limit!r}; give {rule if name == 'bops' else 'a positive number'}")
    targets: list[Target] = []
    if bops is not None:
        targets.append(Target(bit_operations(), float(bops) * plan.full_precision_bops() if bops <= 1 else float(bops)))
    if size_mb is not None:
        targets.append(_scaled(packed_bytes(), size_mb))
    if latency_ms is not None:
        if table is None:
            raise PlanError(
                "budget latency_ms needs table=: lbs.cost.Tuned(), what lbs tune measured, or a function from a "
                "Problem to its seconds"
            )
        targets.append(_scaled(seconds(table, plan), latency_ms))
    if not targets:
        raise PlanError("budget without a target; give bops=, size_mb= or latency_ms=")
    return tuple(targets)


def _scaled(quantity: Quantity, limit: float) -> Target:
    return Target(quantity, float(limit) * quantity.scale)
