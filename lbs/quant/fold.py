"""A norm as a multiplier and a bias per channel, in float64: what packing stores and evaluation computes with.

    norm    z = g * y + h,        g = gamma / sqrt(var + eps),  h = beta - mean * g
    so      y = s * x + t         becomes  z = (g * s) * x + (g * t + h)

Only correctly rounded operations are used, so that every device gets the same bits.
"""

from __future__ import annotations

from torch import Tensor, nn


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(g, h) float64 [C] of a norm in evaluation mode, where it lies; the norm keeps running statistics."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    variance: Tensor = norm.running_var  # type: ignore[assignment]
    gain = (variance.detach().double() + norm.eps).sqrt().reciprocal()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = -mean.detach().double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return gain, shift


def behind(scale: Tensor, shift: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of gain * (scale * x + shift) + offset."""
    return scale * gain, shift * gain + offset
