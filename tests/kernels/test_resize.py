from __future__ import annotations

import math

import numpy as np
import one_step
import pytest
import torch
from contenders import CONTENDERS, ISA_CONTENDERS, assert_same, filled_memory
from torch import Tensor
from torch.nn import functional as F

from lbs_kernels.errors import FormatError
from lbs_kernels.program.operations import resize_taps

# size of the input, channels, size that is written, scale, offset
CASES = {
    "one pixel": ((1, 1), 1, (1, 1), (1.0, 1.0), (0.0, 0.0)),
    "one pixel spread": ((1, 1), 5, (3, 4), (0.3, 0.2), (-0.5, 0.0)),
    "twice, between pixels": ((5, 7), 33, (10, 14), (0.5, 0.5), (-0.25, -0.25)),
    "corner to corner": ((4, 3), 13, (9, 40), (3 / 8, 2 / 39), (0.0, 0.0)),
    "to fewer": ((17, 19), 4, (5, 3), (3.4, 19 / 3), (1.2, 19 / 6 - 0.5)),
    "rows of fewer pixels than a vector": ((3, 2), 6, (31, 3), (0.1, 0.6), (-0.4, -0.3)),
    "one row": ((1, 9), 7, (1, 33), (1.0, 8 / 32), (0.0, 0.0)),
    "positions beyond the image": ((4, 4), 3, (6, 6), (2.0, 1e300), (-5.0, -3.0)),
}


def floats(size: tuple[int, int], channels: int) -> Tensor:
    return torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(3))


def slow(x: np.ndarray, size: tuple[int, int], scale: tuple[float, float], offset: tuple[float, float]) -> np.ndarray:
    """Pixel by pixel, one float32 operation after the other."""
    one, result = np.float32(1), np.zeros((len(x), *size, x.shape[3]), np.float32)

    def taps(side: int, place: int) -> tuple[int, int, np.float32]:
        last = x.shape[1 + side] - 1
        at = min(max(place * scale[side] + offset[side], 0.0), float(last))
        return math.floor(at), min(math.floor(at) + 1, last), np.float32(at - math.floor(at))

    for i in range(size[0]):
        top, bottom, down = taps(0, i)
        for j in range(size[1]):
            left, right, across = taps(1, j)
            upper = x[:, top, left] * (one - across) + x[:, top, right] * across
            lower = x[:, bottom, left] * (one - across) + x[:, bottom, right] * across
            result[:, i, j] = upper * (one - down) + lower * down
    return result


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    size, channels, *resize = CASES[name]
    x = floats(size, channels)
    assert_same(one_step.resize(x, *resize).run("reference"), torch.from_numpy(slow(x.numpy(), *resize)), "resize")


@pytest.mark.parametrize(("backend", "device"), [*CONTENDERS, *ISA_CONTENDERS])
@pytest.mark.parametrize("name", CASES)
def test_back_ends_equal_the_reference(name: str, backend: str, device: str) -> None:
    size, channels, *resize = CASES[name]
    step = one_step.resize(floats(size, channels), *resize)
    with filled_memory():
        actual = step.run(backend, device)
    assert_same(actual, step.run("reference"), "resize")


@pytest.mark.parametrize("align", [False, True])
def test_it_interpolates_as_torch_does(align: bool) -> None:
    x = floats((5, 7), 4)
    size = (11, 16)
    scales = [(n - 1) / (m - 1) if align else n / m for n, m in zip((5, 7), size, strict=True)]
    offsets = [0.0 if align else scale / 2 - 0.5 for scale in scales]
    y = one_step.resize(x, size, tuple(scales), tuple(offsets)).run("auto")
    expected = F.interpolate(x.permute(0, 3, 1, 2).double(), size, mode="bilinear", align_corners=align)
    assert (y.permute(0, 3, 1, 2) - expected).abs().max() < 1e-6


def test_the_order_of_the_sides_matters() -> None:
    """Otherwise no test above could tell one order from the other."""
    x = floats((5, 7), 8)
    y = one_step.resize(x, (10, 14), (0.4, 0.45)).run("auto")
    turned = one_step.resize(x.transpose(1, 2).contiguous(), (14, 10), (0.45, 0.4)).run("auto").transpose(1, 2)
    assert torch.allclose(y, turned, atol=1e-6)
    assert not torch.equal(y, turned)


def test_taps_lie_inside_for_any_numbers() -> None:
    for scale, offset in ((1e308, -1e308), (1e-308, 1e308), (5e-324, -0.0), (1e308, 1e308)):
        first, second, weight = resize_taps(4, 20, scale, offset)
        assert 0 <= first.min() <= first.max() <= 3
        assert torch.equal(second, (first + 1).clamp(max=3))
        assert 0 <= weight.min() <= weight.max() <= 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_batch(backend: str) -> None:
    assert one_step.resize(torch.zeros(0, 7, 5, 3), (2, 4), (3.5, 1.25)).run(backend).shape == (0, 2, 4, 3)


@pytest.mark.parametrize(
    ("size", "scale", "message"), [((0, 4), (1.0, 1.0), "sizes are 1 to"), ((4, 4), (1.0, -1.0), "scales positive")]
)
def test_what_is_refused(size: tuple[int, int], scale: tuple[float, float], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        one_step.resize(torch.zeros(1, 4, 4, 2), size, scale).run("auto")
