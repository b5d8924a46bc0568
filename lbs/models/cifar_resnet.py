"""Post-activation ResNets for 32x32 images (He et al. 2015, arXiv 1512.03385, section 4.2).

State-dict keys: ``conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2,downsample.0,downsample.1}, fc``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with an identity or 1x1 projection shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class CifarResNet(nn.Module):
    """``6n + 2`` layers: a 3x3 stem, three stages of ``n`` basic blocks, mean pooling and a classifier.

    Input ``[N, in_channels, H, W]`` float, 32x32 in the paper; output logits ``[N, num_classes]``.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()
        channels = _WIDTHS[0]
        for index, width in enumerate(_WIDTHS):
            stage = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(BasicBlock(channels, width, stride))
                channels = width
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet20(num_classes: int = 100) -> CifarResNet:
    """ResNet-20 for 32x32 images, 0.27M parameters, 41M multiply-accumulates."""
    return CifarResNet(3, num_classes)


def cifar_resnet56(num_classes: int = 100) -> CifarResNet:
    """ResNet-56 for 32x32 images, 0.86M parameters, 126M multiply-accumulates."""
    return CifarResNet(9, num_classes)


def digits_resnet8(num_classes: int = 10) -> CifarResNet:
    """ResNet-8 for scikit-learn's 8x8 grey digits, 0.08M parameters, 0.8M multiply-accumulates."""
    return CifarResNet(1, num_classes, in_channels=1)
