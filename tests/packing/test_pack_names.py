"""Modules may have any name torch lets them have, keywords of Python among them."""

from __future__ import annotations

from pathlib import Path

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.graph import trace

SHAPE = (3, 8, 8)
NAMES = {
    "keywords": ("class", "lambda", "import", "pass"),
    "constants": ("None", "True", "False", "is"),
    "soft keywords and builtins": ("match", "print", "case", "async"),
    "a keyword and what stands for it": ("class", "def", "def_", "class_"),
    "signs, digits and letters": ("0", "a b", "\xe9", "x-y"),
}


class Inner(nn.Module):
    """A module of the user's that stays in float, with a part, a tensor and a weight of that name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.GroupNorm(2, 8))
        self.register_buffer(f"{name}_", torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(getattr(self, self.name)(x), 1) * getattr(self, f"{self.name}_")


class Named(nn.Module):
    """Two layers that are packed, one norm and one module that are not, and a weight, by these names."""

    def __init__(self, first: str, second: str, norm: str, weight: str) -> None:
        super().__init__()
        self.names = (first, second, norm, weight)
        self.add_module(first, nn.Conv2d(3, 8, 3, padding=1))
        self.add_module(second, nn.Conv2d(8, 8, 1))
        self.add_module(norm, nn.GroupNorm(2, 8))
        self.register_parameter(weight, nn.Parameter(torch.full((8, 1, 1), 1.3)))
        self.inside = Inner(first)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, norm, weight = (getattr(self, name) for name in self.names)
        x = self.inside(norm(torch.relu(second(torch.relu(first(x)))) * weight))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_modules_and_weights(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = pack_nets.quantized(Named(*NAMES[kind]), SHAPE)
    packed = pack_nets.check_equal(model, SHAPE)
    first, second, norm, _ = NAMES[kind]
    assert {first, second} <= {step.name for program in packed.programs for step in program.steps}
    assert norm in dict(packed.kept_float)
    packed.save(tmp_path / "named.lbs.safetensors")
    loaded, x = lbs.load(tmp_path / "named.lbs.safetensors"), pack_nets.images(4, SHAPE, 7)
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
    assert {row.name for row in lbs.explain(loaded, rounds=1).parts} >= {norm}


def test_they_are_searched_and_frozen() -> None:
    torch.manual_seed(6)
    x = pack_nets.images(4, SHAPE)
    model = nn.Sequential()
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    for name, layer in zip(NAMES["keywords"], layers, strict=True):
        model.add_module(name, layer)
    model.add_module("yield", nn.Linear(6 * 16, 3))
    assert trace(model.eval(), x).groups["class"].consumers == ("import",)
    searched = lbs.calibrate(lbs.prepare(model, x), [x])
    frozen = lbs.freeze(searched).eval()
    with torch.no_grad():
        assert torch.equal(lbs.pack(frozen)(x), frozen(x))
