"""`lbs.quantize` on architectures as they are published: packed, in as many regions as stated, as good as int8.

Needs torchvision and timm: pip install -e .[zoos]
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_nets
from ordinary import ordinary
from torch import Tensor, nn

import lbs
from lbs.packing.model import PackedModel
from lbs.traced import tensors_of
from lbs_kernels.program.steps import ConvStep, LinearStep

pytestmark = pytest.mark.slow

SIZES = {"torchvision/inception_v3": 128}  # of sides; others take 96
# (regions, why there is not one).
REGIONS: dict[str, tuple[int, str]] = {
    "torchvision/mobilenet_v3_small": (1, ""),
    "torchvision/efficientnet_b0": (1, ""),
    "torchvision/regnet_y_400mf": (1, ""),
    "torchvision/shufflenet_v2_x1_0": (1, ""),
    "torchvision/densenet121": (1, ""),
    "torchvision/inception_v3": (1, ""),
    "torchvision/squeezenet1_1": (1, ""),
    "torchvision/convnext_tiny": (38, "its 23 layer norms compute in float"),
    "torchvision/deeplabv3_mobilenet_v3_large": (2, "its bilinear upsampling computes in float"),
    "torchvision/resnet18": (1, ""),
    "timm/ghostnet_100": (1, ""),
    "timm/resnet18d": (1, ""),
    "timm/efficientnet_lite0": (1, ""),
    "timm/mobilenetv3_large_100": (1, ""),
    "timm/repvgg_a0": (1, ""),
}
WORST = 1.3  # times the error of an ordinary int8 quantizer


@pytest.mark.parametrize("name", REGIONS)
def test_a_published_architecture_is_packed_whole(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    torch.manual_seed(0)
    size = SIZES.get(name, 96)
    try:
        model = zoo_nets.warmed(zoo_nets.create(name), size)
    except ImportError as error:
        pytest.skip(f"{error}; install it: pip install -e .[zoos]")
    images, unseen = zoo_nets.pictures(8, size, seed=10), zoo_nets.pictures(8, size, seed=11)

    packed = lbs.quantize(model, images)
    assert packed_layers(packed) == called_layers(model, images[:1])

    packed.save(tmp_path / "net.lbs.safetensors")
    loaded = lbs.load(tmp_path / "net.lbs.safetensors")
    assert torch.equal(outputs(loaded, unseen), outputs(packed, unseen))

    expected = outputs(model, unseen)
    ours, theirs = (distance(outputs(one, unseen), expected) for one in (packed, ordinary(model, images)))
    print(f"{name}: {len(packed.programs)} regions, error {ours:.4f}, {ours / theirs:.2f} of ordinary int8")
    assert ours <= WORST * theirs
    regions, reason = REGIONS[name]
    assert (regions == 1) == (reason == "")
    assert len(packed.programs) == regions, f"{name} is {regions} in the table: {reason or 'all of it is packed'}"


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    found: Any = model(images)
    return torch.cat([part.flatten(1) for part in tensors_of(found)], 1)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def packed_layers(packed: PackedModel) -> set[str]:
    """Names of the convolutions and linear layers that run on codes."""
    steps = (step for program in packed.programs for step in program.steps)
    return {step.name for step in steps if isinstance(step, ConvStep | LinearStep)}


def called_layers(model: nn.Module, images: Tensor) -> set[str]:
    """Names of all the model calls."""
    called: set[str] = set()
    handles = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    outputs(model, images)
    for handle in handles:
        handle.remove()
    return called
