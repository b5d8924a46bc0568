"""The numbers of the ledger that the budget's gradient needs, on the device of the gates.

There they keep their place, so that a recorded step goes on with those of the latest look.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lbs.search.ledger import Choice, Ledger
from lbs.search.quantities import Quantity
from lbs.search.stacks import BitStack


class Prices:
    """Of one quantity, while the gates of one side learn; float64, of the ledger's present choices.

    total: what the network costs, a scalar. widths: the bit gates that learn; open, steps: for every step between their
    neighbouring widths, 1 where it is open, and its price [K]. filters: the prune gates; slopes: what one filter costs,
    0 where there is one number of them [P]: towards the neighbouring number, and of times, which fall by stairs,
    towards the one below at which a filter less saves most.
    """

    def __init__(self, ledger: Ledger, quantity: Quantity, side: str, device: torch.device) -> None:
        self.ledger, self.quantity = ledger, quantity
        self._widths = [choice for choice in ledger.choices if choice.kind == side]
        self.widths = BitStack(choice.gate for choice in self._widths)
        self.filters = ledger.prune_stacks
        self._steps: dict[tuple[Choice, tuple[int, int, int, int]], tuple[list[float], list[float]]] = {}
        self._numbers = sent(self._values(), device)
        self._cut()

    def read(self) -> None:
        """Follow the ledger."""
        self._numbers = renewed(self._numbers, self._values())
        self._cut()

    def _cut(self) -> None:
        count = sum(choice.top for choice in self._widths)
        self.total, rest = self._numbers[0], self._numbers[1:]
        self.open, self.steps, self.slopes = rest.split([count, count, len(self.ledger.filters)])

    def _values(self) -> list[float]:
        total = float(self.ledger.total(self.quantity))
        widths = [self._steps_of(choice) for choice in self._widths]
        opened, steps = ([number for width in widths for number in width[part]] for part in (0, 1))
        slopes = [self._slope(choice) if choice.top else 0.0 for choice in self.ledger.filters]
        return [total, *opened, *steps, *slopes]

    def _steps_of(self, choice: Choice) -> tuple[list[float], list[float]]:
        """Which steps of a width are open, and their prices; kept, for the same amounts come up again and again."""
        (layer,) = choice.touched
        key = choice, layer.amounts()
        if key not in self._steps:
            opened = [float(level < choice.level) for level in range(choice.top)]
            changes = self.ledger.changes(self.quantity, choice)
            self._steps[key] = opened, [wider - narrower for narrower, wider in pairwise(changes)]
        return self._steps[key]

    def _slope(self, choice: Choice) -> float:
        stairs = self.quantity.measured or self.quantity.modelled
        levels = range(choice.level) if choice.level and stairs else (choice.level - 1 if choice.level else 1,)
        changes = ((self.ledger.change(self.quantity, choice, level), choice.amounts[level]) for level in levels)
        return max(change / (amount - choice.amount) for change, amount in changes)


def sent(values: list[float], device: torch.device) -> Tensor:
    """float64 tensor on `device`, which need not be waited for."""
    return _pinned(values).to(device, non_blocking=True)


def renewed(old: Tensor, values: list[float]) -> Tensor:
    """The numbers in place of `old`: where it lies on a GPU, which recorded work reads; else a tensor of their own."""
    return old.copy_(_pinned(values), non_blocking=True) if old.is_cuda else torch.tensor(values, dtype=torch.float64)


def _pinned(values: list[float]) -> Tensor:
    """In memory that a GPU reads by itself, where there is one."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
