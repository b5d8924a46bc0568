from __future__ import annotations

import numpy as np
import pytest
import torch
from contenders import CONTENDERS, assert_same, filled_memory
from torch import Tensor

from lbs_kernels.errors import ShapeError
from lbs_kernels.pool.op import pool

# size, channels, kernel, stride, padding
WINDOWS = {
    "one pixel": ((1, 1), 1, (1, 1), (1, 1), (0, 0)),
    "imagenet stem": ((11, 9), 13, (3, 3), (2, 2), (1, 1)),
    "halves": ((8, 6), 33, (2, 2), (2, 2), (0, 0)),
    "pixels left over": ((7, 5), 31, (2, 2), (2, 2), (0, 0)),
    "overlapping": ((6, 6), 64, (3, 3), (1, 1), (1, 1)),
    "asymmetric": ((6, 9), 5, (1, 4), (2, 3), (0, 2)),
    "whole image": ((4, 5), 7, (4, 5), (1, 1), (0, 0)),
    "stride beyond the kernel": ((9, 9), 4, (2, 2), (4, 3), (1, 0)),
}


def codes_of(size: tuple[int, int], channels: int) -> Tensor:
    return torch.randint(0, 256, (2, *size, channels), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def floats_of(size: tuple[int, int], channels: int) -> Tensor:
    return torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(2)) - 1.0  # maxima are negative too


def slow_max(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Window by window, looking at real pixels only."""
    height, width = x.shape[1:3]
    rows = range(-padding[0], height + padding[0] - kernel[0] + 1, stride[0])
    columns = range(-padding[1], width + padding[1] - kernel[1] + 1, stride[1])
    result = torch.zeros(x.shape[0], len(rows), len(columns), x.shape[3], dtype=x.dtype)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = x[:, max(row, 0) : row + kernel[0], max(column, 0) : column + kernel[1]]
            result[:, i, j] = window.amax(dim=(1, 2))
    return result


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("make", [codes_of, floats_of])
def test_reference_maximum(name: str, make: object) -> None:
    size, channels, *window = WINDOWS[name]
    x = make(size, channels)  # type: ignore[operator]
    kernel, stride, padding = window
    y = pool(x, kind="max", kernel=kernel, stride=stride, padding=padding, backend="reference")
    assert_same(y, slow_max(x, kernel, stride, padding), "maximum")


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("make", [codes_of, floats_of])
def test_back_ends_equal_the_reference(name: str, make: object, backend: str, device: str) -> None:
    size, channels, kernel, stride, padding = WINDOWS[name]
    x = make(size, channels)  # type: ignore[operator]
    expected = pool(x, kind="max", kernel=kernel, stride=stride, padding=padding, backend="reference")
    with filled_memory():
        actual = pool(x.to(device), kind="max", kernel=kernel, stride=stride, padding=padding, backend=backend)
    assert_same(actual, expected, "maximum")


def slow_mean(x: Tensor) -> Tensor:
    """One float32 addition after the other, in numpy."""
    values = x.numpy()
    batch, height, width, channels = values.shape
    result = np.zeros((batch, 1, 1, channels), dtype=np.float32)
    for n in range(batch):
        for c in range(channels):
            total = values[n, 0, 0, c]
            for pixel in range(1, height * width):
                total = np.float32(total + values[n, pixel // width, pixel % width, c])
            result[n, 0, 0, c] = np.float32(total * np.float32(1.0 / (height * width)))
    return torch.from_numpy(result)


MEANS = {"one pixel": ((1, 1), 3), "8x8": ((8, 8), 64), "7x7": ((7, 7), 33), "a row": ((1, 13), 17), "odd": ((5, 3), 1)}


@pytest.mark.parametrize("name", MEANS)
def test_reference_mean_adds_in_row_major_order(name: str) -> None:
    x = floats_of(*MEANS[name])
    assert_same(pool(x, kind="mean", backend="reference"), slow_mean(x), "mean")


def test_the_order_of_the_mean_matters() -> None:
    """Otherwise the test above could not tell one order from another."""
    x = floats_of(*MEANS["8x8"])
    assert not torch.equal(pool(x, kind="mean"), pool(x.transpose(1, 2).contiguous(), kind="mean"))


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("name", MEANS)
def test_back_ends_equal_the_reference_mean(name: str, backend: str, device: str) -> None:
    x = floats_of(*MEANS[name])
    with filled_memory():
        actual = pool(x.to(device), kind="mean", backend=backend)
    assert_same(actual, pool(x, kind="mean", backend="reference"), "mean")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_batch(backend: str) -> None:
    empty = torch.zeros(0, 7, 5, 3)
    assert pool(empty, kind="mean", backend=backend).shape == (0, 1, 1, 3)
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    assert pool(empty, kind="max", backend=backend, **window).shape == (0, 4, 3, 3)
    codes = pool(empty.to(torch.uint8), kind="max", backend=backend, **window)
    assert codes.shape == (0, 4, 3, 3)
    assert codes.dtype == torch.uint8


def test_strides_do_not_matter() -> None:
    x = floats_of((6, 5), 8)
    other = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for arguments in ({"kind": "mean"}, {"kind": "max", "kernel": (2, 2), "stride": (2, 2)}):
        assert_same(pool(other, **arguments), pool(x, **arguments), arguments["kind"])


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(1, 4, 4, 2, dtype=torch.float64), {"kind": "max"}, "expected uint8 codes or float32"),
        (torch.zeros(4, 4, 2), {"kind": "max"}, r"\[N, H, W, C\]"),
        (torch.zeros(1, 4, 4, 2, dtype=torch.uint8), {"kind": "mean"}, "decode them first"),
        (torch.zeros(1, 4, 4, 2), {"kind": "mean", "kernel": (2, 2)}, "the mean is global"),
        (torch.zeros(1, 4, 4, 2), {"kind": "median"}, "expected max or mean"),
        (torch.zeros(1, 4, 4, 2), {"kind": "max", "kernel": (2, 2), "padding": (2, 0)}, "at most half the kernel"),
        (torch.zeros(1, 4, 4, 2), {"kind": "max", "kernel": (0, 2)}, "at most half the kernel"),
        (torch.zeros(1, 4, 4, 2), {"kind": "max", "kernel": (5, 2)}, "does not fit 4 x 4 pixels"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        pool(x, **arguments)  # type: ignore[arg-type]


def test_op_is_well_formed() -> None:
    x = torch.randn(2, 4, 4, 3)
    torch.library.opcheck(torch.ops.lbs_kernels.pool.default, (x, "max", [2, 2], [2, 2], [0, 0], "auto"))
    torch.library.opcheck(torch.ops.lbs_kernels.pool.default, (x, "mean", [1, 1], [1, 1], [0, 0], "auto"))
