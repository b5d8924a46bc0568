"""Architectures of torchvision and timm with random weights, and images they can be calibrated on."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def torchvision() -> ModuleType:
    """torchvision, also where its compiled operations do not load beside this build of torch; none is called here.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):  # the first of the two that are looked for while it is imported
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    found = importlib.import_module("torchvision")
    found._operations_of_tests = library  # type: ignore[attr-defined]  they vanish with this object
    return found


def create(name: str) -> nn.Module:
    """`torchvision/<name>` or `timm/<name>`, random weights.

    Raises:
        ImportError: the package is not installed.
    """
    package, _, model = name.partition("/")
    zoo = torchvision()  # timm imports it too
    if package == "timm":
        return importlib.import_module("timm").create_model(model, pretrained=False)
    if model.startswith("deeplab"):
        return getattr(zoo.models.segmentation, model)(weights=None, weights_backbone=None)
    options = {"aux_logits": False, "init_weights": False} if model.startswith("inception") else {}
    return zoo.models.get_model(model, weights=None, **options)


def pictures(count: int, size: int, seed: int) -> Tensor:
    """[count, 3, size, size] of mean 0: noise at several scales, so that neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, 3, size, size)
    for cells in (2, 5, 11, 23, 47):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        found += F.interpolate(noise, (size, size), mode="bilinear") / cells**0.5
    return found / found.std()


@torch.no_grad()
def warmed(model: nn.Module, size: int) -> nn.Module:
    """The model in evaluation, its norms' statistics those of pictures."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean of all batches
    model.train()
    for seed in range(3):
        model(pictures(16, size, seed))
    return model.eval()
