from __future__ import annotations

import numpy as np
import one_step
import pytest
import torch
from contenders import CONTENDERS, ISA_CONTENDERS, assert_same, filled_memory
from torch import Tensor

from lbs_kernels.errors import FormatError

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
    y = one_step.pool(x, kind="max", kernel=kernel, stride=stride, padding=padding).run("reference")
    assert_same(y, slow_max(x, kernel, stride, padding), "maximum")


@pytest.mark.parametrize(("backend", "device"), [*CONTENDERS, *ISA_CONTENDERS])
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("make", [codes_of, floats_of])
def test_back_ends_equal_the_reference(name: str, make: object, backend: str, device: str) -> None:
    size, channels, kernel, stride, padding = WINDOWS[name]
    x = make(size, channels)  # type: ignore[operator]
    step = one_step.pool(x, kind="max", kernel=kernel, stride=stride, padding=padding)
    expected = step.run("reference")
    with filled_memory():
        actual = step.run(backend, device)
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
    assert_same(one_step.pool(x, kind="mean").run("reference"), slow_mean(x), "mean")


def test_the_order_of_the_mean_matters() -> None:
    """Otherwise the test above could not tell one order from another."""
    x = floats_of(*MEANS["8x8"])
    turned = x.transpose(1, 2).contiguous()
    assert not torch.equal(one_step.pool(x, kind="mean").run("auto"), one_step.pool(turned, kind="mean").run("auto"))


@pytest.mark.parametrize(("backend", "device"), [*CONTENDERS, *ISA_CONTENDERS])
@pytest.mark.parametrize("name", MEANS)
def test_back_ends_equal_the_reference_mean(name: str, backend: str, device: str) -> None:
    step = one_step.pool(floats_of(*MEANS[name]), kind="mean")
    with filled_memory():
        actual = step.run(backend, device)
    assert_same(actual, step.run("reference"), "mean")


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_batch(backend: str) -> None:
    empty = torch.zeros(0, 7, 5, 3)
    assert one_step.pool(empty, kind="mean").run(backend).shape == (0, 1, 1, 3)
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    assert one_step.pool(empty, kind="max", **window).run(backend).shape == (0, 4, 3, 3)
    codes = one_step.pool(empty.to(torch.uint8), kind="max", **window).run(backend)
    assert codes.shape == (0, 4, 3, 3)
    assert codes.dtype == torch.uint8


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(1, 4, 4, 2, dtype=torch.uint8), {"kind": "mean"}, "expected stream"),
        (torch.zeros(1, 4, 4, 2), {"kind": "mean", "kernel": (2, 2)}, "the mean is global"),
        (torch.zeros(1, 4, 4, 2), {"kind": "median"}, "kind is 'median'"),
        (torch.zeros(1, 4, 4, 2), {"kind": "max", "kernel": (2, 2), "padding": (2, 0)}, "at most half of the kernel"),
        (torch.zeros(1, 4, 4, 2), {"kind": "max", "kernel": (0, 2)}, r"kernel \(0, 2\)"),
        (torch.zeros(1, 4, 4, 2), {"kind": "max", "kernel": (5, 2)}, "height = 0"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        one_step.pool(x, **arguments).run("auto")  # type: ignore[arg-type]
