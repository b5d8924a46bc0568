"""Float networks by name. Weights are the user's: `create` returns them randomly initialised.

>>> import lbs.models
>>> model = lbs.models.create("cifar_resnet20", num_classes=100)
>>> lbs.models.example("cifar_resnet20").shape
torch.Size([1, 3, 32, 32])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbs.models.cifar_resnet import CifarResNet, cifar_resnet20, cifar_resnet56, digits_resnet8
from lbs.models.digits_vgg import DigitsVGG, digits_vgg5
from lbs.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from lbs.models.preresnet import PreResNet, preresnet20, preresnet56
from lbs.models.resnet import ResNet, resnet18, resnet50
from lbs_kernels.errors import LbsError


@dataclass(frozen=True)
class ModelEntry:
    """How to build a network and what it expects."""

    build: Callable[[int], nn.Module]
    num_classes: int
    input_shape: tuple[int, int, int]  # channels, height, width
    prune_group: int  # consecutive filters pruned together: B of the paper


REGISTRY: dict[str, ModelEntry] = {
    "digits_resnet8": ModelEntry(digits_resnet8, 10, (1, 8, 8), 4),
    "digits_vgg5": ModelEntry(digits_vgg5, 10, (1, 8, 8), 16),
    "cifar_resnet20": ModelEntry(cifar_resnet20, 100, (3, 32, 32), 4),
    "cifar_resnet56": ModelEntry(cifar_resnet56, 100, (3, 32, 32), 4),
    "preresnet20": ModelEntry(preresnet20, 100, (3, 32, 32), 4),
    "preresnet56": ModelEntry(preresnet56, 100, (3, 32, 32), 4),
    "resnet18": ModelEntry(resnet18, 1000, (3, 224, 224), 16),
    "resnet50": ModelEntry(resnet50, 1000, (3, 224, 224), 16),
    "mobilenet_v2": ModelEntry(mobilenet_v2, 1000, (3, 224, 224), 8),
}


def entry(name: str) -> ModelEntry:
    """The registry's entry of `name`. Raises LbsError for an unknown name."""
    if name not in REGISTRY:
        raise LbsError(f"no model is called {name!r}; known are {', '.join(REGISTRY)}")
    return REGISTRY[name]


def create(name: str, num_classes: int | None = None) -> nn.Module:
    """A randomly initialised network; `num_classes` defaults to what the network was published for.

    Raises LbsError for an unknown name or fewer than one class.
    """
    found = entry(name)
    classes = found.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise LbsError(f"model {name}: num_classes is {classes}; a classifier needs at least 1")
    return found.build(classes)


def example(name: str, batch: int = 1) -> Tensor:
    """Zeros float32 [batch, C, H, W] of the shape the network expects, for tracing."""
    return torch.zeros(batch, *entry(name).input_shape, dtype=torch.float32)


__all__ = [
    "REGISTRY",
    "CifarResNet",
    "DigitsVGG",
    "MobileNetV2",
    "ModelEntry",
    "PreResNet",
    "ResNet",
    "cifar_resnet20",
    "cifar_resnet56",
    "create",
    "digits_resnet8",
    "digits_vgg5",
    "entry",
    "example",
    "mobilenet_v2",
    "preresnet20",
    "preresnet56",
    "resnet18",
    "resnet50",
]
