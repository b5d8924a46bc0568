"""Losses with one choice lower: those of whole passes, bit for bit, at the price of the layers behind the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.search.budget import Budget
from lbs.search.layers import SearchLayer
from lbs.search.prepare import SearchConfig, prepare
from lbs.search.projection import at_levels
from lbs.search.sensitivity import losses


class Branches(nn.Module):
    """A residual, a branch that joins late, a layer called twice and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.twice, self.branch = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(3, 8, 1)
        self.wide, self.back = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.spare, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.branch(x)
        y = torch.relu(self.norm(self.stem(x)))
        y = y + torch.relu(self.one(y))
        y = torch.relu(self.back(torch.relu(self.wide(y))))
        y = torch.relu(self.twice(torch.relu(self.twice(y))))
        return {"logits": self.head((y + early).relu().mean((2, 3)))}


def squared(outputs: Any, wanted: Tensor) -> Tensor:
    return (outputs["logits"] - wanted).square().mean()


class Untraced(Branches):
    """Decides by a number."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x if float(x.sum()) > 0 else -x)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Branches, {"bits": (4, 8)}),
        (Branches, {"bits": (2, 4, 8)}),
        (Untraced, {"bits": (4, 8), "pruning": False, "trace": False}),
    ],
)
def test_they_are_those_of_whole_passes(network: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(count, 3, 6, 6), torch.randn(count, 5)) for count in (3, 2)]
    model = prepare(network().eval(), batches[0][0], SearchConfig(**options))
    lbs.calibrate(model.eval(), [x for x, _ in batches])
    ledger = Budget(model, bops=0.06).ledger
    with torch.no_grad():
        ledger.read(errors=True)
        at_levels(ledger, lambda choice: choice.top)
        ledger.apply()
        open_loss, below = losses(model, ledger, batches, squared)

        def mean() -> float:
            return sum(float(squared(model(x), y)) * (len(x) / 5) for x, y in batches)

        assert open_loss == mean()
        assert {choice.kind for choice in below} == {
            "weights",
            "activations",
            *(["filters"] if options.get("pruning", True) else []),
        }
        for choice, found in below.items():
            assert len(found) == choice.top
            for level, value in enumerate(found):
                choice.level = level
                ledger.apply()
                assert value == mean(), (choice.layer, choice.kind, level)
            choice.level = choice.top
            ledger.apply()
    assert any(value != open_loss for found in below.values() for value in found)


def test_layers_in_front_of_a_choice_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(6)))
    x = torch.randn(2, 4, 5, 5)
    searched = lbs.calibrate(prepare(model, x, SearchConfig(bits=(4, 8), pruning=False)).eval(), [x])
    ledger = Budget(searched, bops=0.06).ledger
    calls = []
    forward = SearchLayer.forward
    monkeypatch.setattr(SearchLayer, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    with torch.no_grad():
        at_levels(ledger, lambda choice: choice.top)
        ledger.apply()
        losses(searched, ledger, [(x, 0)], lambda outputs, _: outputs.sum())
    open_passes = len(calls) - 2 * sum(6 - index for index in range(1, 5))
    assert len(ledger.choices) == 8  # the first and the last layer keep 8 bits
    assert open_passes <= 6 * 4  # the walk, and what tracing takes
