"""Transposed convolutions as nn.Conv2d: filters first in the weight, as all other layers have them.

Whatever reads or changes a layer then has two kinds to know, convolutions and linear layers; what differs is how the
operation is computed, which pixels it reads, and the steps it becomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class TransposedConv2d(nn.Conv2d):
    """nn.ConvTranspose2d with its weight as [O, C / groups, kh, kw].

    sized: it was called with an `output_size`, which decides about the output padding anew in every call.
    """

    output_padding: tuple[int, int]

    def __init__(self, *args: Any, output_padding: int | tuple[int, int] = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output_padding = (output_padding,) * 2 if isinstance(output_padding, int) else output_padding
        self.sized = False

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is None:
            return self._conv_forward(input, self.weight, self.bias)
        self.sized = True
        sides: Any = zip(input.shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        least = [(size - 1) * s - 2 * p + d * (k - 1) + 1 for size, k, s, p, d in sides]
        extra = tuple(int(size) - low for size, low in zip(output_size[-2:], least, strict=True))
        return self.spread(input, self.weight, self.bias, extra)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.spread(input, weight, bias, self.output_padding)

    def spread(self, input: Tensor, weight: Tensor, bias: Tensor | None, extra: tuple[int, ...]) -> Tensor:
        """The operation on these operands, with `extra` output padding."""
        options: Any = (self.stride, self.padding, extra, self.groups, self.dilation)
        return F.conv_transpose2d(input, swapped(weight, self.groups), bias, *options)


PLAIN: tuple[type[nn.Module], ...] = (TransposedConv2d, nn.Conv2d, nn.Linear)  # derived classes first


def plain_kind(layer: nn.Module) -> Any:
    """The class of a convolution or linear layer without quantization: what a float layer like it is made of."""
    return next(kind for kind in PLAIN if isinstance(layer, kind))


def swapped(weight: Tensor, groups: int) -> Tensor:
    """[O, C / groups, ...] as [C, O / groups, ...], and back."""
    parts = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return parts.reshape(-1, *parts.shape[2:])


def as_convolution(layer: nn.ConvTranspose2d) -> TransposedConv2d:
    """The same as an nn.Conv2d: its bias, and a weight of its own."""
    made: TransposedConv2d = _made(TransposedConv2d, layer)
    return made


def as_torch(layer: TransposedConv2d) -> nn.ConvTranspose2d:
    """The inverse of `as_convolution`."""
    made: nn.ConvTranspose2d = _made(nn.ConvTranspose2d, layer)
    return made


def _made(kind: Any, like: Any) -> Any:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "output_padding")
    options = {name: getattr(like, name) for name in names}
    made = kind(like.in_channels, like.out_channels, bias=False, device="meta", **options)
    made.weight = nn.Parameter(swapped(like.weight.detach(), like.groups).contiguous(), like.weight.requires_grad)
    made.bias = like.bias
    return made
