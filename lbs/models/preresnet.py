"""Pre-activation ResNets for 32x32 images (He et al. 2016, arXiv 1603.05027) with 1x1-convolution shortcuts.

A block that changes the shape projects the ACTIVATED input, so that every convolution but the stem reads values that
cannot be negative; all other shortcuts are the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WIDTHS = (16, 32, 64)


class PreActBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; the sum with the shortcut is not activated."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(active)
        out = self.relu(self.bn2(self.conv1(active)))
        return self.conv2(out) + identity


class PreResNet(nn.Module):
    """``6n + 2`` layers: a 3x3 stem, three stages of ``n`` blocks, norm, ReLU, mean pooling and a classifier.

    Input ``[N, 3, 32, 32]`` float; output logits ``[N, num_classes]``.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, 1, 1, bias=False)
        channels = _WIDTHS[0]
        for index, width in enumerate(_WIDTHS):
            stage = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(PreActBlock(channels, width, stride))
                channels = width
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(self.relu(self.bn(x)))
        return self.fc(torch.flatten(x, 1))


def preresnet20(num_classes: int = 100) -> PreResNet:
    """Pre-activation ResNet-20 for 32x32 images, 40.819M multiply-accumulates."""
    return PreResNet(3, num_classes)


def preresnet56(num_classes: int = 100) -> PreResNet:
    """Pre-activation ResNet-56 for 32x32 images, 125.754M multiply-accumulates."""
    return PreResNet(9, num_classes)
