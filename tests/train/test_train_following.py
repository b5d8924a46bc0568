"""Training to return what the float network returns: views of images, what learns, and that it helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.quant.layers import QuantLayer
from lbs.train import following
from lbs.train.following import distance, follow, varied


def images(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[nn.Module, nn.Module]:
    """digits_resnet8 in float, and at 2/2 bits."""
    torch.manual_seed(0)
    model = lbs.models.create("digits_resnet8").train()
    with torch.no_grad():
        for _ in range(4):
            model(images())
    model.eval()
    return model, lbs.calibrate(lbs.uniform(model, images(2), 2, 2), [images()]).eval()


def apart(network: nn.Module, model: nn.Module) -> float:
    x = images(64, seed=9)
    with torch.no_grad():
        return float(distance(network(x), model(x)))


def test_it_comes_nearer_and_leaves_ranges_norms_and_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RATE", 1e-3)  # a network of noise has far to go
    model, network = pair()
    before, teacher = copy.deepcopy(network.state_dict()), copy.deepcopy(model.state_dict())
    far = apart(network, model)
    hooks = [len(m._forward_pre_hooks) for m in network.modules()]
    loss = follow(network, model, [images(40), images(24, seed=1)], epochs=30, last="fc")
    assert apart(network, model) < 0.9 * far
    assert 0 < loss < 8 * far  # of crops, which are harder
    after = network.state_dict()
    ranges = {f"{n}.w_range" for n, m in network.named_modules() if isinstance(m, QuantLayer)}
    for name, value in before.items():
        still = name.startswith("fc.") or name in ranges or ".quantizer." in name or ".running_" in name
        assert torch.equal(after[name], value) or not still, name
    assert not torch.equal(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    assert all(torch.equal(value, teacher[name]) for name, value in model.state_dict().items())
    assert not network.training
    assert [len(m._forward_pre_hooks) for m in network.modules()] == hooks
    assert lbs.verify(network, lbs.pack(network), images(4)).ok


def test_a_seed_repeats_it_and_another_does_not() -> None:
    found = []
    for seed in (0, 0, 1):
        model, network = pair()
        follow(network, model, [images()], epochs=1, last="fc", seed=seed)
        found.append(network.state_dict()["layer1.0.conv1.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_views_are_crops_of_half_the_area_or_more(size: tuple[int, int]) -> None:
    """Of an image whose values say where they lie."""
    height, width = size
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    one: Any = torch.stack([rows[:, None].expand(size), columns.expand(size)])
    x = one.expand(40, 2, *size).contiguous()
    views = varied(x, torch.Generator().manual_seed(0))
    assert views.shape == x.shape
    assert views.min() >= 0
    assert (views.amax((2, 3)) <= torch.tensor([height - 1, width - 1])).all()
    spans = views.amax((2, 3)) - views.amin((2, 3))
    assert (spans >= 0.5 * torch.tensor([height - 1, width - 1]) - 1).all()
    turned = views[:, 1, 0, 0] > views[:, 1, 0, -1]
    assert 5 < int(turned.sum()) < 35
    assert len(views.flatten(1).unique(dim=0)) > 20
    lines = torch.randn(3, 2, 9)
    assert varied(lines, torch.Generator()) is lines
