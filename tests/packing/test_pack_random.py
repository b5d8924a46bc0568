"""Random networks: whatever order norms, clamps, sums, pools and float operations come in, packed equals the model."""

from __future__ import annotations

import random

import pack_nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.packing.explain import streams_of_codes
from lbs.quant.quantizers import StreamQuantizer
from lbs.search.streams import NAME, Encoded

SHAPE = (3, 8, 8)
CHANNELS = 4


ACTIVATIONS = (
    *(nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.Sigmoid, nn.SiLU, nn.Tanh),
    *(lambda: nn.GELU("tanh"), nn.PReLU, lambda: nn.PReLU(CHANNELS)),
)


class RandomNet(nn.Module):
    """A chain of random operations on a pool of values of one shape, then a classifier.

    Every operation reads one or two earlier values, so values are shared and summed in any order. What none reads is
    added in the end: behind layers that dead code reads too, roundings may differ.
    """

    def __init__(self, seed: int, length: int = 12) -> None:
        super().__init__()
        chance = random.Random(seed)
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.steps: list[tuple[str, int, int]] = []
        self.parts = nn.ModuleList()
        kinds = [
            "conv",
            "conv",
            "conv1",
            "norm",
            "norm",
            "relu",
            "relu",
            "relu6",
            "add",
            "add",
            "pool",
            "drop",
            "activation",
            "activation",
            "gate",
            "softplus",
        ]
        for index in range(length):
            kind = chance.choice(kinds)
            recent = [chance.randrange(max(0, index - 2), index + 1) for _ in range(2)]
            self.steps.append((kind, recent[0], recent[1]))
            self.parts.append(
                {
                    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=chance.choice([1, 2])),
                    "conv1": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
                    "norm": lambda: nn.BatchNorm2d(CHANNELS),
                    "pool": lambda: nn.MaxPool2d(3, 1, 1),
                    "drop": lambda: nn.Dropout(0.1),
                    "activation": lambda: chance.choice(ACTIVATIONS)(),
                    "gate": lambda: nn.Sequential(
                        nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, CHANNELS, 1), chance.choice(ACTIVATIONS)()
                    ),
                }.get(kind, nn.Identity)()
            )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [torch.relu(self.stem(x))]
        for (kind, one, other), part in zip(self.steps, self.parts, strict=True):
            y = values[one]
            if kind == "conv":
                y = torch.relu(y)  # signed codes have no zero to pad with
            if kind == "relu":
                y = F.relu(y)
            elif kind == "relu6":
                y = F.relu6(y)
            elif kind == "add":
                y = y + values[other]
            elif kind == "softplus":
                y = F.softplus(y)
            elif kind == "gate":
                y = y * part(values[other])
            else:
                y = part(y)
            values.append(y)
        two = ("add", "gate")
        read = {place for kind, one, other in self.steps for place in ((one, other) if kind in two else (one,))}
        last = values[-1]
        for place, value in enumerate(values[:-2]):
            last = last if place in read else last + value
        return self.fc(self.pool(last).flatten(1)), values[-2]


@pytest.mark.parametrize("seed", range(16))
def test_random_network(seed: int) -> None:
    model = pack_nets.quantized(RandomNet(seed), SHAPE, w_bits=4, a_bits=4)
    packed = pack_nets.check_equal(model, SHAPE, batch=2)
    known = ("softplus", "parts", "relu", "add", "mul", "pool", "flatten", "fc")
    assert all(name.startswith(known) for name, _ in packed.kept_float)
    if not packed.kept_float:  # beside float parts roundings may differ
        x = pack_nets.images(100, SHAPE, 6)
        with torch.no_grad():
            pack_nets.assert_same(model(x), packed(x))


@pytest.mark.parametrize("bits", [(4, 8), (4, 4)])
def test_random_networks_with_streams_anywhere(bits: tuple[int, int]) -> None:
    """Of 8 bits: where they are planned, and behind every second part, whoever reads it."""
    coded = []
    for seed in range(8):
        model = pack_nets.quantized(RandomNet(seed), SHAPE, *bits, streams=8)
        coded += streams_of_codes(pack_nets.check_equal(model, SHAPE, batch=2).programs[0])
        called = ("conv", "conv1", "norm", "pool", "drop", "activation")
        free = [
            part
            for part, (kind, *_) in zip(model.parts, model.steps, strict=True)  # type: ignore[arg-type]
            if kind in called and not hasattr(part, NAME)
        ]
        for part in free[::2]:
            part.add_module(NAME, StreamQuantizer())
            part.register_forward_hook(Encoded())
        lbs.calibrate(model, [pack_nets.images(8, SHAPE, 100)], norms="keep").eval()
        coded += streams_of_codes(pack_nets.check_equal(model, SHAPE, batch=2).programs[0])
    assert len(coded) > 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_many_random_networks(seed: int) -> None:
    model = pack_nets.quantized(RandomNet(seed, length=20), SHAPE, w_bits=2, a_bits=8)
    pack_nets.check_equal(model, SHAPE, batch=2)
