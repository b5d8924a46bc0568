"""The numbers of the ledger that the budget's gradient needs, on the device of the gates.

There they keep their place, so that a recorded step goes on with those of the latest look.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lbs.search.ledger import Ledger
from lbs.search.quantities import Quantity


class Prices:
    """Of one quantity, while the gates of one side learn; float64, of the ledger's present choices.

    total: what the network costs, a scalar. widths: the choices that learn; open, steps: for every step between their
    neighbouring widths, 1 where it is open, and its price [K]. filters: choices with filters to close; slopes: what one
    filter costs, towards the neighbouring number of them [P].
    """

    def __init__(self, ledger: Ledger, quantity: Quantity, side: str, device: torch.device) -> None:
        self.ledger, self.quantity = ledger, quantity
        self.widths = [choice for choice in ledger.choices if choice.kind == side]
        self.filters = [choice for choice in ledger.choices if choice.kind == "filters" and choice.top]
        self._numbers = sent(self._values(), device)
        self._cut()

    def read(self) -> None:
        """Follow the ledger."""
        self._numbers = renewed(self._numbers, self._values())
        self._cut()

    def _cut(self) -> None:
        count = sum(choice.top for choice in self.widths)
        self.total, rest = self._numbers[0], self._numbers[1:]
        self.open, self.steps, self.slopes = rest.split([count, count, len(self.filters)])

    def _values(self) -> list[float]:
        total = float(self.ledger.total(self.quantity))
        opened = [float(level < choice.level) for choice in self.widths for level in range(choice.top)]
        steps, slopes = [], []
        for choice in self.widths:
            prices = [self.ledger.change(self.quantity, choice, level) for level in range(len(choice.amounts))]
            steps += [after - before for before, after in pairwise(prices)]
        for choice in self.filters:
            level = choice.level - 1 if choice.level else 1
            change = self.ledger.change(self.quantity, choice, level)
            slopes.append(change / (choice.amounts[level] - choice.amount))
        return [total, *opened, *steps, *slopes]


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
