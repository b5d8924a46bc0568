"""The definition of quantpack: an image or a stream becomes float32 values [N, H, W, C], which the epilogue encodes."""

from __future__ import annotations

from torch import Tensor

from lbs_kernels.program.epilogue import fma32


def read_values(x: Tensor, form: str, multiplier: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """y = fma(float32(x), multiplier[c], bias[c]), or float32(x) without them.

    Args:
        x: an image float32 or uint8 [N, C, H, W] in any memory format, or a stream [N, H, W, C] in any stream type.
        form: "image" or "stream".
        multiplier, bias: float32 [C], both or none.

    Returns:
        float32 [N, H, W, C].
    """
    values = x.permute(0, 2, 3, 1).float() if form == "image" else x.float()
    return values if multiplier is None or bias is None else fma32(values, multiplier, bias)
