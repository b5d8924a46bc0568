"""First and last layer stay at 8 / 8 bits: what is counted of a float network is what becomes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.cost import EDGE_BITS, NetworkLayers, edge_layers, network_layers
from lbs.cost.latency import latency_grid
from lbs.graph import record_of
from lbs.plan import Plan
from lbs.search.freeze import plan_of


def ends_in_linear() -> nn.Module:
    convs = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))


def ends_in_conv() -> nn.Module:
    """A small segmentation network: ten classes for every pixel."""
    convs = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(*convs, nn.Conv2d(8, 10, 1))


def only_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


class LinearFirst(nn.Module):
    """Colours are mixed by a linear layer, at every pixel, in front of the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.body, self.head = nn.Linear(3, 4), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mix(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(torch.relu(self.body(x)))


class Twice(nn.Module):
    """A layer in the middle and the last one are called twice, on inputs of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.neck, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.body(torch.relu(self.stem(x))))))
        x = torch.relu(self.neck(x))
        return self.head(x.mean((2, 3))) + self.head(x.amax((2, 3)))


class Auxiliary(nn.Module):
    """A head in the middle that always runs, one that runs only in training, and a layer that never does.

    They are declared around the others: the order that counts is that of execution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.never, self.head = nn.Linear(3, 3), nn.Conv2d(8, 2, 1)
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.side, self.training_only = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        side = self.side(x.mean((2, 3)))
        x = self.head(torch.relu(self.body(x)))
        if self.training:
            side = side + self.training_only(x.mean((2, 3)))
        return x.mean((2, 3)) + side.mean(1, keepdim=True)


NETWORKS: dict[Callable[[], nn.Module], tuple[str, str]] = {
    ends_in_linear: ("0", "8"),
    ends_in_conv: ("0", "4"),
    only_linear: ("1", "5"),
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3)): ("0", "0"),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)): ("1", "1"),
    LinearFirst: ("mix", "head"),
    Twice: ("stem", "head"),
    Auxiliary: ("stem", "head"),
}
EXAMPLE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
each_network = pytest.mark.parametrize(("make", "edges"), NETWORKS.items())


def counted(make: Callable[[], nn.Module]) -> NetworkLayers:
    return network_layers(make(), EXAMPLE)


@each_network
@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (2, 4), (8, 2), (8, 8)])
def test_uniform_bits_cost_what_was_counted(
    make: Callable[[], nn.Module], edges: tuple[str, str], w_bits: int, a_bits: int
) -> None:
    layers = counted(make).with_bits(w_bits, a_bits)
    plan = record_of(lbs.uniform(make(), EXAMPLE, w_bits, a_bits)).plan
    assert layers.edges == plan.edges == edges
    assert plan.bops() == layers.bops()
    bits = {layer.name: (layer.problem.w_bits, layer.problem.a_bits) for layer in layers.layers}
    assert {layer.name: (layer.w_bits, layer.a_bits) for layer in plan.layers} == bits
    inner = {pair for name, pair in bits.items() if name not in edges}
    assert inner <= {(w_bits, a_bits)}
    assert {bits[name] for name in edges} == {(EDGE_BITS, EDGE_BITS)}


@each_network
@pytest.mark.parametrize("trace", [True, False])
def test_a_search_of_one_width_costs_what_was_counted(
    make: Callable[[], nn.Module], edges: tuple[str, str], trace: bool
) -> None:
    """Widths and kept filters are read from the layers and gates here, not from the record."""
    config = lbs.SearchConfig(bits=(4,), pruning=trace, trace=trace)
    searched = lbs.prepare(make().eval(), EXAMPLE, config)
    assert plan_of(searched).bops() == counted(make).with_bits(4, 4).bops()
    assert all(searched.get_submodule(name).prune is None for name in edges)


def test_a_network_that_ends_in_a_convolution() -> None:
    stem, body, head = 64 * 3 * 8 * 9, 64 * 8 * 8 * 9, 64 * 8 * 10
    assert counted(ends_in_conv).with_bits(4, 4).bops() == 64 * stem + 16 * body + 64 * head == 1_802_240
    grid = latency_grid(counted(ends_in_conv), [(4, 4)], group=2, points=2)
    assert {problem.out_channels for problem in grid if problem.kernel == (1, 1)} == {10}
    assert {problem.in_channels for problem in grid if problem.kernel == (1, 1)} == {4, 8}


def test_no_layer_has_no_edges() -> None:
    assert edge_layers([]) == ()
    assert Plan(()).with_bits(4, 4) == Plan(())
