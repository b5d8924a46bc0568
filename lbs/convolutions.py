"""Convolutions of torch's that are no nn.Conv2d, as nn.Conv2d: filters first in the weight, which has two dimensions.

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

    def __init__(self, *args: Any, output_padding: tuple[int, int] = (0, 0), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output_padding = output_padding
        self.sized = False

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is None:
            return self._conv_forward(input, self.weight, self.bias)
        self.sized = True
        sides = zip(input.shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        least = [(size - 1) * s - 2 * int(p) + d * (k - 1) + 1 for size, k, s, p, d in sides]
        extra = tuple(int(size) - low for size, low in zip(output_size[-2:], least, strict=True))
        return self._transposed(input, self.weight, self.bias, extra)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._transposed(input, weight, bias, self.output_padding)

    def _transposed(self, input: Tensor, weight: Tensor, bias: Tensor | None, extra: tuple[int, ...]) -> Tensor:
        options: Any = (self.stride, self.padding, extra, self.groups, self.dilation)
        return F.conv_transpose2d(input, swapped(weight, self.groups), bias, *options)


class LineConv2d(nn.Conv2d):
    """nn.Conv1d with its weight as [O, C / groups, 1, k]: lines [N, C, L] are images of one row."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input.unsqueeze(-2), weight, bias).squeeze(-2)


PLAIN: tuple[type[nn.Module], ...] = (TransposedConv2d, LineConv2d, nn.Conv2d, nn.Linear)  # derived classes first
TORCH: dict[type[nn.Module], type[nn.Module]] = {nn.ConvTranspose2d: TransposedConv2d, nn.Conv1d: LineConv2d}


def plain_kind(layer: nn.Module) -> type[nn.Module]:
    """The class of a convolution or linear layer without quantization: what a float layer like it is made of."""
    return next(kind for kind in PLAIN if isinstance(layer, kind))


def swapped(weight: Tensor, groups: int) -> Tensor:
    """[O, C / groups, ...] as [C, O / groups, ...], and back."""
    parts = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return parts.reshape(-1, *parts.shape[2:])


def as_convolution(layer: Any) -> nn.Conv2d:
    """A layer of a class of `TORCH` as an nn.Conv2d: its bias, and a weight of its own."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        own = {"output_padding": layer.output_padding}
        return _made(TransposedConv2d, layer, _sizes(layer), swapped(weight, layer.groups), own)
    sizes = {name: value if isinstance(value, str) else (fill, *value) for name, (value, fill) in _filled(layer).items()}
    return _made(LineConv2d, layer, sizes, weight.unsqueeze(2), {"padding_mode": layer.padding_mode})


def as_torch(layer: Any) -> nn.Module:
    """The layer of torch's that a convolution of this module computes as, with a weight of its own."""
    weight = layer.weight.detach()
    if isinstance(layer, TransposedConv2d):
        own = {"output_padding": layer.output_padding}
        return _made(nn.ConvTranspose2d, layer, _sizes(layer), swapped(weight, layer.groups), own)
    sizes = {name: value if isinstance(value, str) else value[1:] for name, value in _sizes(layer).items()}
    return _made(nn.Conv1d, layer, sizes, weight.squeeze(2), {"padding_mode": layer.padding_mode})


def _sizes(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def _filled(layer: nn.Conv1d) -> dict[str, tuple[Any, int]]:
    """Sizes of a line with what they are for its one row."""
    return {name: (value, 0 if name == "padding" else 1) for name, value in _sizes(layer).items()}


def _made(kind: Any, like: Any, sizes: dict[str, Any], weight: Tensor, options: dict[str, Any]) -> Any:
    made = kind(like.in_channels, like.out_channels, **sizes, groups=like.groups, bias=False, **options, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), like.weight.requires_grad)
    made.bias = like.bias
    return made
