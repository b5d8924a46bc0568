"""The definition of pool: the maximum over a window, and the global mean in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def max_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Maximum over each window; padding never wins.

    Args:
        x: uint8 codes or a stream, [N, H, W, C].

    Returns:
        The same dtype for codes, float32 for a stream; [N, H', W', C].
    """
    pooled = torch.nn.functional.max_pool2d(x.float().permute(0, 3, 1, 2), kernel, stride, padding)
    pooled = pooled.permute(0, 2, 3, 1)
    return pooled.to(torch.uint8) if x.dtype == torch.uint8 else pooled


def mean_pool(x: Tensor) -> Tensor:
    """Global mean float32 [N, 1, 1, C] of a stream [N, H, W, C].

    y[c] = (((x[0, c] + x[1, c]) + x[2, c]) + ...) * float32(1 / (H W)): float32 sums over pixels in row-major order.
    The order is part of the definition, so that every back end gives the same bits.
    """
    pixels = x.float().flatten(1, 2)
    count = pixels.shape[1]
    total = pixels[:, 0]
    for index in range(1, count):
        total = total + pixels[:, index]
    return (total * torch.tensor(1.0 / count, dtype=torch.float32, device=x.device))[:, None, None]
