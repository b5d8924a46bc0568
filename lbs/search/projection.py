"""From choices to a plan that holds its targets: close what hurts least per unit saved, then spend what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lbs.search.ledger import Choice, Ledger
from lbs.search.quantities import Quantity, Target

CLOSE_ENOUGH = 0.97  # of the target: nearer is not worth another exchange


def fits(ledger: Ledger, targets: Sequence[Target]) -> bool:
    """Whether every target holds under the present choices."""
    return all(ledger.total(target.quantity) <= target.limit for target in targets)


def fill(ledger: Ledger, targets: Sequence[Target]) -> float:
    """The share of its limit that the fullest target uses."""
    return max(ledger.total(target.quantity) / target.limit for target in targets)


def project(ledger: Ledger, targets: Sequence[Target], filters_last: bool = True) -> None:
    """Change the ledger's choices, not the gates, until every target holds and little is left over.

    filters_last: filters go only after every width is at its narrowest, one step at a time. Their importance and the
    errors of widths are no common currency, unless both were measured as losses.
    """
    close_cheapest(ledger, targets, filters_last)
    spend_rest(ledger, targets)
    exchange(ledger, targets, filters_last)


def close_cheapest(ledger: Ledger, targets: Sequence[Target], filters_last: bool) -> None:
    """Close the choice with the smallest error added per share of the limits it saves, until every target holds.

    By several levels where one alone saves nothing: four bits may be slower than eight and two faster, and time may
    fall by tiles of filters. Where no closing saves anything any more, only other pairs of widths do: then the layers
    take their cheapest, and `spend_rest` opens what fits.
    """
    while True:
        over = [t for t in targets if ledger.total(t.quantity) > t.limit]
        if not over:
            return
        widths = [i for i, c in enumerate(ledger.choices) if c.kind != "filters"]
        filters = [i for i, c in enumerate(ledger.choices) if c.kind == "filters"]
        for places in (widths, filters) if filters_last else (widths + filters,):
            rated = [(*found, i) for i in places if (found := _closing(ledger, over, ledger.choices[i])) is not None]
            if rated:
                break
        else:
            worst = max(over, key=lambda target: ledger.total(target.quantity) / target.limit)
            ledger.make_cheapest(worst.quantity)
            return
        _, level, index = min(rated)
        ledger.choices[index].level = level


def _closing(ledger: Ledger, over: Sequence[Target], choice: Choice) -> tuple[float, int] | None:
    """Error added per share saved, and the level: the next below that saves anything."""
    for level in reversed(range(choice.level)):
        saved = sum(max(0.0, -ledger.change(t.quantity, choice, level)) / t.limit for t in over)
        if saved:
            return sum(choice.errors[level : choice.level]) / saved, level
    return None


def spend_rest(ledger: Ledger, targets: Sequence[Target]) -> None:
    """Open the choice whose error is largest per share of the limits it costs, as long as one fits."""
    while True:
        rated = []
        for index, choice in enumerate(ledger.choices):
            if choice.level < choice.top:
                cost = _room_taken(ledger, targets, choice)
                if cost is not None:
                    rated.append((choice.errors[choice.level] / max(cost, 1e-12), -index))
        if not rated:
            return
        ledger.choices[-max(rated)[1]].level += 1


def _room_taken(ledger: Ledger, targets: Sequence[Target], choice: Choice) -> float | None:
    """Share of the limits that one level more takes; None where it does not fit."""
    cost = 0.0
    for target in targets:
        more = ledger.change(target.quantity, choice, choice.level + 1)
        if ledger.total(target.quantity) + more > target.limit:
            return None
        cost += more / target.limit
    return cost


def exchange(ledger: Ledger, targets: Sequence[Target], filters_last: bool = True, rounds: int = 20) -> None:
    """While a target is filled by less than 97 %: close one choice and open others, if what errors add goes down.

    Filling a target is no end in itself: what lowers nothing but the room left over is not done.
    """
    for _ in range(rounds):
        if fill(ledger, targets) >= CLOSE_ENOUGH or not fits(ledger, targets):
            return
        before = [choice.level for choice in ledger.choices]
        best, found = _errors_of(ledger, filters_last), before
        for down in [choice for choice in ledger.choices if choice.level > 0]:
            down.level -= 1
            _fill_up(ledger, targets, down)
            errors = _errors_of(ledger, filters_last)
            if _lower(errors, best):
                best, found = errors, [choice.level for choice in ledger.choices]
            _set(ledger, before)
        if found is before:
            return
        _set(ledger, found)


def _errors_of(ledger: Ledger, filters_last: bool) -> tuple[float, ...]:
    """What the closed levels add: of filters and of widths each by itself, or of both if they were measured alike."""
    added = {"filters": 0.0, "widths": 0.0}
    for choice in ledger.choices:
        added["filters" if choice.kind == "filters" else "widths"] += math.fsum(choice.errors[choice.level :])
    return tuple(added.values()) if filters_last else (sum(added.values()),)


def _lower(errors: Sequence[float], than: Sequence[float]) -> bool:
    """Whether one part is lower, by more than sums round, and none is higher."""
    pairs = list(zip(errors, than, strict=True))
    return all(one <= other for one, other in pairs) and any(one < other * (1 - 1e-9) for one, other in pairs)


def _fill_up(ledger: Ledger, targets: Sequence[Target], without: Choice) -> None:
    """Open the choice that takes most room among those that fit, until none does."""
    while True:
        options = [c for c in ledger.choices if c.level < c.top and c is not without]
        rated = [(room, -i) for i, c in enumerate(options) if (room := _room_taken(ledger, targets, c)) is not None]
        if not rated:
            return
        options[-max(rated)[1]].level += 1


def _set(ledger: Ledger, levels: Sequence[int]) -> None:
    for choice, level in zip(ledger.choices, levels, strict=True):
        choice.level = level


def smallest_step(ledger: Ledger, quantity: Quantity) -> float:
    """The least that opening one choice by one level would add; 0 where all are open."""
    steps = [ledger.change(quantity, c, c.level + 1) for c in ledger.choices if c.level < c.top]
    return min((step for step in steps if step > 0), default=0.0)


def at_levels(ledger: Ledger, levels: Callable[[Choice], int]) -> None:
    """Set every choice to the level a function gives."""
    for choice in ledger.choices:
        choice.level = levels(choice)
