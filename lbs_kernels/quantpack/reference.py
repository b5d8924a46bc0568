"""The definition of quantpack: floats of an image become float32 values [N, H, W, C], which the epilogue encodes."""

from __future__ import annotations

from torch import Tensor


def read_values(x: Tensor, form: str) -> Tensor:
    """float32 [N, H, W, C] of an image float32 [N, C, H, W], or of a stream [N, H, W, C] in any stream type."""
    return x.permute(0, 2, 3, 1).float() if form == "image" else x.float()
