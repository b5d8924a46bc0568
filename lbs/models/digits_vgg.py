"""A plain chain of 3x3 convolutions in the manner of VGG (Simonyan and Zisserman 2014, arXiv 1409.1556).

No sum ties its channels: filters of every convolution but the first may go. State-dict keys:
``features.{0,1,3,4,7,8,10,11}, fc``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WIDTHS = ((64, 64), (128, 128))


class DigitsVGG(nn.Module):
    """Two stages of two 3x3 convolutions with norms, maximum pooling between them, mean pooling and a classifier.

    Input ``[N, 1, H, W]`` float, 8x8 for scikit-learn's digits; output logits ``[N, num_classes]``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for stage in _WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


def digits_vgg5(num_classes: int = 10) -> DigitsVGG:
    """Five layers for scikit-learn's 8x8 grey digits, 0.26M parameters, 5.9M multiply-accumulates."""
    return DigitsVGG(num_classes)
