"""Images given as bytes: the normalisation a network was trained with, as one multiplication and one addition.

x = (byte / 255 - mean[c]) / std[c] = byte * scale[c] + shift[c],   scale = 1 / (255 std),   shift = -mean / std
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError, ShapeError


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel of pixels scaled to 0..1, as torchvision's Normalize takes them.

    Raises:
        FormatError: lengths that differ, or values that are not finite and, for std, positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise FormatError(
                f"normalize has mean {self.mean} and std {self.std}; give one value of each per image channel"
            )
        if not all(math.isfinite(m) for m in self.mean) or not all(0 < s < math.inf for s in self.std):
            raise FormatError(
                f"normalize has mean {self.mean} and std {self.std}; they are finite, and std is above 0, of pixels "
                "scaled to 0..1"
            )

    @staticmethod
    def of(value: Any) -> Normalization:
        """From (mean, std), each a sequence with one number per channel. Raises FormatError."""
        try:
            mean, std = (tuple(float(number) for number in part) for part in value)
        except (TypeError, ValueError) as error:
            raise FormatError(f"normalize is {value!r}; give (mean, std), one number per channel in each") from error
        return Normalization(mean, std)

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) float64 [C] of a byte."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return 1 / (255 * std), -mean / std

    def check_channels(self, channels: int) -> None:
        """Raises ShapeError where images have another number of channels."""
        if len(self.mean) != channels:
            raise ShapeError(
                f"normalize has {len(self.mean)} means and deviations, the images {channels} channels; give one of "
                "each per channel"
            )

    def values(self, x: Tensor) -> Tensor:
        """float64 [N, C, H, W] of bytes uint8 [N, C, H, W].

        Raises:
            ShapeError: another dtype, rank or number of channels.
        """
        if x.dtype is not torch.uint8 or x.dim() != 4:
            raise ShapeError(
                f"images are {x.dtype} of shape {list(x.shape)}; a network packed with normalize= takes the bytes of "
                "images, uint8 [N, C, H, W]"
            )
        self.check_channels(x.shape[1])
        scale, shift = (along_channels(part, x) for part in self.affine)
        return x.double() * scale + shift


def along_channels(values: Sequence[float] | Tensor, x: Tensor) -> Tensor:
    """One float64 value per channel, to be broadcast over images [N, C, H, W] on their device."""
    return torch.as_tensor(values, dtype=torch.float64, device=x.device)[:, None, None]
