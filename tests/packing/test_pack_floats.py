"""The float network of a packed one: the same graph in torch's layers, as near as codes are to their values."""

from __future__ import annotations

import json
from pathlib import Path

import pack_nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lbs
from lbs.cli import main
from lbs.packing.floats import float_network
from lbs.packing.model import PackedModel
from lbs_kernels.errors import GraphError


def distance(packed: PackedModel) -> float:
    """Between the outputs of both, as a share of their length."""
    images = packed.random_images(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = packed(images), float_network(packed)(packed.float_images(images).float())
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "size"), [("cifar_resnet20", None), ("preresnet20", None), ("mobilenet_v2", 64)])
def test_eight_bits_are_near(name: str, size: int | None) -> None:
    assert distance(lbs.pack(pack_nets.network(name, 8, 8, size), verify=False)) < 0.2


class Scaled(nn.Module):
    """A norm, and a weight of the network's own, between packed layers: both stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.softplus(self.norm(torch.relu(self.first(x))) * self.scale))


def test_the_packed_network_keeps_its_parts_in_float() -> None:
    torch.manual_seed(0)
    packed = lbs.pack(pack_nets.quantized(Scaled(), (3, 10, 10), 8, 8), verify=False)
    assert len(list(packed.body.parameters())) == 3
    images = packed.random_images(2)
    expected = packed(images)
    plain = float_network(packed).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(packed(images), expected)


def test_parts_in_float_and_filters_that_are_gone_are_as_they_are() -> None:
    assert distance(lbs.pack(pack_nets.quantized(pack_nets.TwoRegions(), (3, 10, 10), 8, 8), verify=False)) < 0.1
    packed = lbs.pack(pack_nets.mixed_network(), verify=False)
    filters = [module.out_channels for module in float_network(packed).modules() if isinstance(module, nn.Conv2d)]
    assert sorted(filters) == sorted(
        packed.programs[0].arrays[step.multiplier].shape[0]
        for step in packed.programs[0].steps
        if step.op == "bitconv2d"
    )


class Mixed(nn.Module):
    """Functions, gates, concatenation, pooling and interpolation between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.gate, self.last, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.silu(self.stem(x)), 2)
        x = torch.cat([F.hardswish(self.left(x)), F.leaky_relu(self.right(x), 0.125)], 1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = F.avg_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2)
        return self.fc(F.elu(self.last(F.interpolate(x, scale_factor=2))).mean((2, 3)))


def test_other_steps_are_found_in_it() -> None:
    torch.manual_seed(0)
    packed = lbs.pack(pack_nets.quantized(Mixed(), (3, 10, 10), 8, 8), verify=False)
    assert len(packed.regions) == 1
    assert distance(packed) < 0.1


def test_bench_of_a_file_alone_has_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.lbs.safetensors"
    pack_nets.packed_digits().save(path)
    options = ["--batches", "1", "--rounds", "1", "--threads", "1", "--baselines", "float32,uniform8"]
    assert main.main(["bench", str(path), "--json", *options]) == 0
    captured = capsys.readouterr()
    assert {row["contender"] for row in json.loads(captured.out)["rows"]} == {
        "packed",
        "torch float32",
        "packed uniform 8-bit",
    }
    assert "float baselines: the packed network's own graph in float" in captured.err


def test_pixels_that_are_moved_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 4, 1))
    with pytest.raises(GraphError, match="moves pixels; no float network can be made of the packed one"):
        float_network(lbs.pack(pack_nets.quantized(model, (3, 10, 10)), verify=False))
