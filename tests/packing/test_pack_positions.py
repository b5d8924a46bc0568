"""Linear layers at several positions: packed as convolutions over pixels, equal to the model to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.packing.packing import pack
from lbs.packing.positions import OverPositions
from lbs_kernels.program.steps import ConvStep, LinearStep

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Patches, two linear layers, whatever is between them, a linear head."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16), nn.ReLU(inplace=True)
        self.one, self.two, self.head = nn.Linear(16, width), nn.Linear(width, 16), nn.Linear(16, 4)
        self.middle = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, self.stem(x)))


def patches(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def mixed(net: Net, y: Tensor) -> Tensor:
    z = patches(y)
    return (z + net.two(net.act(net.one(net.norm(z))))).mean(1)


def over_channels(net: Net, y: Tensor) -> Tensor:
    z = patches(y)  # [N, 16 patches, 16 channels]
    return (z + net.two(net.act(net.one(z.transpose(1, 2)))).transpose(1, 2)).mean(1)


def images_last(net: Net, y: Tensor) -> Tensor:
    z = y.permute(0, 2, 3, 1)
    return (z + net.two(torch.sigmoid(net.one(z)))).mean((1, 2))


def batch_second(net: Net, y: Tensor) -> Tensor:
    z = y.flatten(2).permute(2, 0, 1)
    return (z + net.two(torch.relu(net.one(z)))).mean(0)


def windows(net: Net, y: Tensor) -> Tensor:
    z = y.unflatten(2, (2, 2)).permute(0, 2, 3, 4, 1).flatten(0, 1)  # twice as many windows as images
    return net.two(net.one(z)).unflatten(0, (-1, 2)).mean((1, 2, 3))


def at_all_and_at_one(net: Net, y: Tensor) -> Tensor:
    return net.two(net.one(patches(y))).mean(1) + net.two(net.one(y.mean((2, 3))))


def at_every_patch(net: Net, y: Tensor) -> Tensor:
    return net.two(torch.relu(net.one(patches(y))))


FORWARDS = [mixed, over_channels, images_last, batch_second, windows, at_all_and_at_one, at_every_patch]


@pytest.mark.parametrize("forward", FORWARDS)
def test_they_equal_the_model_at_every_batch_size(forward: Callable[[Net, Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = pack_nets.quantized(Net(forward), SHAPE, 4, 8)
    packed = pack(model)
    packed.save(tmp_path / "net")
    loaded = lbs.load(tmp_path / "net")
    steps = [
        step.name for program in packed.programs for step in program.steps if isinstance(step, ConvStep | LinearStep)
    ]
    assert {name.partition("#")[0] for name in steps} == {"stem", "one", "two", "head"}
    for batch in (5, 1, 2):
        x = pack_nets.images(batch, SHAPE)
        with torch.no_grad():
            assert torch.equal(packed(x), model(x))
            assert torch.equal(loaded(x), model(x))
        assert lbs.verify(model, packed, x).ok
    assert isinstance(model.one, nn.Linear)  # the model given stays


def test_a_layer_its_activation_and_the_next_layer_are_one_region() -> None:
    torch.manual_seed(4)
    packed = pack(pack_nets.quantized(Net(mixed), SHAPE))
    together = [program for program in packed.programs if {"one", "two"} <= {step.name for step in program.steps}]
    assert len(together) == 1
    assert [type(step).__name__ for step in together[0].steps] == ["QuantPackStep", "ConvStep", "ConvStep"]


def test_reports_name_nothing_that_the_model_does_not_do() -> None:
    torch.manual_seed(5)
    packed = pack(pack_nets.quantized(Net(batch_second), SHAPE))
    assert [name for name, _ in packed.kept_float] == ["flatten", "permute", "relu", "add", "mean"]


def test_codes_are_those_of_the_linear_layer() -> None:
    torch.manual_seed(6)
    layer = pack_nets.quantized(Net(mixed), SHAPE, 2, 4).one
    twin = OverPositions(layer)  # type: ignore[arg-type]
    assert torch.equal(twin.weight_codes()[:, :, 0, 0], layer.weight_codes())  # type: ignore[operator]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        found = twin.eval()(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        assert torch.equal(found, layer(x))
