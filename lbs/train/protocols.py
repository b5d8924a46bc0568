"""What the trainer asks of those around it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class BudgetTerm(Protocol):
    """What the trainer asks of a budget."""

    def __call__(self) -> Tensor: ...

    @property
    def side(self) -> str: ...

    def clamp(self) -> None: ...

    def advance(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Progress(Protocol):
    """Told how far a phase is."""

    def begin(self, phase: str, total: int, done: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def note(self, row: dict[str, Any]) -> None: ...

    def end(self) -> None: ...
