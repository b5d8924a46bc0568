"""Layers chosen by reason for the s8 kernels: for the model of the GPU, and for a GPU."""

from __future__ import annotations

from typing import Any

import one_step
import torch
from torch import Tensor

from lbs_kernels.program.planes import pack_weights

# K is counted in units of 16 channels under a tap: 8 of them are a chunk, 2 a multiplication.
SHAPES: dict[str, dict[str, Any]] = {
    "smallest": {"shape": (1, 1, 1, 1), "filters": 1, "kernel": (1, 1)},
    "pointwise": {"shape": (3, 9, 5, 64), "filters": 65, "kernel": (1, 1)},  # half a chunk; pixels +-1 of two tiles
    "chunk": {"shape": (1, 8, 8, 128), "filters": 64, "kernel": (1, 1)},  # exactly one; a tile of pixels, of filters
    "strided": {"shape": (2, 9, 9, 96), "filters": 130, "kernel": (1, 1), "stride": (2, 2)},
    "same": {
        "shape": (1, 12, 11, 32),
        "filters": 33,
        "kernel": (3, 3),
        "padding": (1, 1),
    },  # 18 units: 2 chunks and one
    "halved": {"shape": (2, 7, 6, 48), "filters": 20, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "uneven": {"shape": (1, 6, 5, 40), "filters": 13, "kernel": (3, 3), "stride": (3, 2), "padding": (0, 1)},
    "dilated": {"shape": (1, 9, 9, 16), "filters": 70, "kernel": (3, 3), "dilation": (2, 3), "padding": (2, 3)},
    "outside": {"shape": (1, 3, 4, 32), "filters": 5, "kernel": (5, 1), "padding": (5, 1)},  # windows beyond the image
    "pixel": {"shape": (2, 3, 3, 33), "filters": 9, "kernel": (3, 3)},  # one output pixel of each image
    "stem": {"shape": (1, 15, 14, 3), "filters": 24, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "odd": {
        "shape": (1, 5, 7, 77),
        "filters": 127,
        "kernel": (1, 3),
        "padding": (0, 1),
    },  # pruned: a multiple of nothing
    "long": {"shape": (1, 3, 3, 304), "filters": 8, "kernel": (3, 3), "padding": (1, 1)},  # more chunks than any ring
}
# Weights and how the activations read: every width, both grids where there is a choice, zero points, signed codes.
READINGS: dict[str, dict[str, Any]] = {
    "w8": {"w_bits": 8, "grid": "zero"},
    "w8_zero": {"w_bits": 8, "grid": "zero", "zero": 117},
    "w8_odd": {"w_bits": 8, "grid": "odd", "zero": 40},
    "w8_odd_signed": {"w_bits": 8, "grid": "odd", "signed": True},
    "w8_signed": {"w_bits": 8, "grid": "zero", "signed": True},
    "w7_odd": {"w_bits": 7, "grid": "odd", "zero": 255},
    "w4_odd": {"w_bits": 4, "grid": "odd"},
    "w4_zero": {"w_bits": 4, "grid": "zero", "zero": 3},
    "w2_odd_signed": {"w_bits": 2, "grid": "odd", "signed": True},
    "w1": {"w_bits": 1, "grid": "odd", "zero": 128},
}


def random_codes(
    seed: int, shape: tuple[int, ...], filters: int, kernel: tuple[int, int], w_bits: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, H, W, C] of 8 bits, with both ends among them, and weight planes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 1 << w_bits, (filters, *kernel, shape[-1]), generator=generator, dtype=torch.uint8)
    x.view(-1)[::7] = 255
    codes.view(-1)[::5] = (1 << w_bits) - 1
    codes.view(-1)[::11] = 0
    return x, pack_weights(codes, w_bits)


def layer(name: str, reading: str = "w8", seed: int = 0, batch: int | None = None) -> one_step.OneStep:
    """A convolution of `SHAPES` read as one of `READINGS`, whose stream is float32(acc)."""
    window = dict(SHAPES[name])
    shape, filters = window.pop("shape"), window.pop("filters")
    how = dict(READINGS[reading])
    w_bits = how.pop("w_bits")
    shape = shape if batch is None else (batch, *shape[1:])
    x, planes = random_codes(seed, shape, filters, window["kernel"], w_bits)
    return one_step.conv(x, planes, a_bits=8, **window, **how)
