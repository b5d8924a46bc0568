from __future__ import annotations

from dataclasses import dataclass

import one_step
import pytest
import torch
from contenders import CONTENDERS, assert_same, filled_memory
from torch import Tensor

from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.program import operations
from lbs_kernels.program.epilogue import fma32
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.steps import WeightGrid
from lbs_kernels.program.window import Window


@dataclass(frozen=True)
class Case:
    """One convolution, and why it is here."""

    why: str
    channels: int
    filters: int
    size: tuple[int, int]
    batch: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    w_bits: int = 4
    a_bits: int = 4
    zero: int = 0
    signed: bool = False
    grid: WeightGrid = "odd"

    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.padding, self.dilation, self.groups)

    def reading(self) -> dict[str, object]:
        return {"a_bits": self.a_bits, "zero": self.zero, "signed": self.signed, "grid": self.grid}

    def geometry(self) -> dict[str, object]:
        return {**vars(self.window()), **self.reading()}


CASES = [
    Case("one of everything", 1, 1, (1, 1), batch=1, kernel=(1, 1), padding=(0, 0), w_bits=1, a_bits=1),
    Case("one pixel, all padding around it", 3, 2, (1, 1)),
    Case("word - 1 channels", 31, 4, (5, 4)),
    Case("word channels", 32, 4, (5, 4)),
    Case("word + 1 channels", 33, 5, (5, 4)),
    Case("two words - 1", 63, 17, (4, 4), w_bits=2, a_bits=2),
    Case("two words + 1", 65, 16, (4, 4), w_bits=2, a_bits=8),
    Case("odd, pruned widths", 13, 44, (7, 5), w_bits=8, a_bits=2),
    Case("odd the other way", 44, 13, (5, 7), w_bits=2, a_bits=8),
    Case("eight by eight", 20, 9, (6, 6), w_bits=8, a_bits=8),
    Case("one by eight", 20, 9, (6, 6), w_bits=1, a_bits=8),
    Case("bits in between", 20, 9, (6, 6), w_bits=3, a_bits=5),
    Case("stride 2", 16, 8, (9, 8), stride=(2, 2)),
    Case("stride of two sizes", 16, 8, (9, 8), stride=(3, 1)),
    Case("stride that leaves pixels over", 8, 8, (8, 8), kernel=(3, 3), stride=(2, 2), padding=(0, 0)),
    Case("1x1 stride 2, a shortcut", 16, 32, (8, 8), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Case("7x7 stem", 3, 8, (15, 13), kernel=(7, 7), stride=(2, 2), padding=(3, 3), w_bits=8, a_bits=8, zero=117),
    Case("dilated", 12, 8, (9, 9), dilation=(2, 3), padding=(2, 3)),
    Case("asymmetric kernel", 12, 8, (6, 7), kernel=(1, 5), padding=(0, 2)),
    Case("even kernel", 12, 8, (6, 7), kernel=(2, 4), padding=(1, 2)),
    Case("kernel as large as the padded image", 5, 3, (3, 2), kernel=(5, 4)),
    Case("grouped", 24, 12, (5, 5), groups=3),
    Case("grouped over a word each", 66, 6, (4, 4), groups=2),
    Case("depthwise", 20, 20, (6, 5), groups=20, w_bits=8, a_bits=8),
    Case("depthwise with a multiplier", 7, 21, (6, 5), groups=7),
    Case("network input", 3, 16, (8, 8), w_bits=8, a_bits=8, zero=128),
    Case("network input, zero at the end", 3, 16, (8, 8), w_bits=8, a_bits=8, zero=255),
    Case("a zero at 8 bits", 33, 17, (5, 4), w_bits=8, a_bits=8, grid="zero"),
    Case("a zero at 4 bits", 31, 16, (5, 4), w_bits=4, a_bits=8, zero=9, grid="zero"),
    Case("a zero at 2 bits", 33, 8, (5, 4), w_bits=2, a_bits=2, grid="zero"),
    Case("a zero at 1 bit", 33, 8, (5, 4), w_bits=1, a_bits=4, grid="zero"),
    Case("a zero, depthwise", 20, 20, (6, 5), groups=20, w_bits=8, a_bits=8, zero=3, grid="zero"),
    Case("a zero, grouped", 24, 12, (5, 5), groups=3, w_bits=4, a_bits=4, grid="zero"),
    Case("a zero, signed", 19, 8, (5, 5), padding=(0, 0), w_bits=8, signed=True, grid="zero"),
    Case("signed", 19, 8, (5, 5), padding=(0, 0), signed=True),
    Case("signed 8 bits", 19, 8, (5, 5), kernel=(1, 1), padding=(0, 0), w_bits=8, a_bits=8, signed=True),
]


def operands(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x codes, weight codes [O, kh, kw, C / groups], planes, multiplier, bias."""
    generator = torch.Generator().manual_seed(seed)
    x_shape = (case.batch, *case.size, case.channels)
    w_shape = (case.filters, *case.kernel, case.channels // case.groups)
    x = torch.randint(0, 1 << case.a_bits, x_shape, generator=generator, dtype=torch.uint8)
    w = torch.randint(0, 1 << case.w_bits, w_shape, generator=generator, dtype=torch.uint8)
    multiplier = torch.randn(case.filters, generator=generator)
    return x, w, pack_weights(w, case.w_bits), multiplier, torch.randn(case.filters, generator=generator)


def slow_accumulator(case: Case, x: Tensor, w: Tensor) -> Tensor:
    """int64 [N, H', W', O], pixel by pixel in plain integer arithmetic: nothing shared with the reference."""
    n_w, n_x = (1 << case.w_bits) - 1, (1 << case.a_bits) - 1
    weight = 2 * w.to(torch.int64) - n_w if case.grid == "odd" else w.to(torch.int64) - (n_w + 1) // 2
    value = 2 * x.to(torch.int64) - n_x if case.signed else x.to(torch.int64) - case.zero
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = case.kernel, case.stride, case.padding, case.dilation
    batch, height, width, channels = x.shape
    padded = torch.zeros(batch, height + 2 * ph, width + 2 * pw, channels, dtype=torch.int64)  # code z is value 0
    padded[:, ph : ph + height, pw : pw + width] = value
    rows = range(0, padded.shape[1] - dh * (kh - 1), sh)
    columns = range(0, padded.shape[2] - dw * (kw - 1), sw)
    acc = torch.zeros(batch, len(rows), len(columns), case.filters, dtype=torch.int64)
    per_group, filters = channels // case.groups, case.filters // case.groups
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, row : row + dh * (kh - 1) + 1 : dh, column : column + dw * (kw - 1) + 1 : dw]
            for o in range(case.filters):
                group = o // filters * per_group
                acc[:, i, j, o] = (window[..., group : group + per_group] * weight[o]).sum(dim=(1, 2, 3))
    return acc


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_reference_equals_plain_integer_arithmetic(case: Case) -> None:
    x, w, planes, _, _ = operands(case)
    acc = operations.accumulate(x, planes, case.window(), **case.reading())
    assert acc.dtype == torch.int32
    assert_same(acc.to(torch.int64), slow_accumulator(case, x, w), "accumulator")
    assert len(acc.unique()) > 1 or acc.numel() == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_the_reference_runs_the_definition(case: Case) -> None:
    x, w, planes, multiplier, bias = operands(case, 1)
    y = one_step.conv(x, planes, multiplier, bias, **case.geometry()).run("reference")
    assert_same(y, fma32(slow_accumulator(case, x, w).float(), multiplier, bias), "y")


@pytest.mark.parametrize(("backend", "device"), CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_back_ends_equal_the_reference(case: Case, backend: str, device: str) -> None:
    x, _, planes, multiplier, bias = operands(case, 2)
    step = one_step.conv(x, planes, multiplier, bias, **case.geometry())
    expected = step.run("reference")
    with filled_memory():
        actual = step.run(backend, device)
    assert_same(actual, expected, "y")


# 255 * 255 * 33025 is the last sum that fits 31 bits; 33025 = 25 taps of 1321 channels.
CORNER = Case("overflow corner", 1321, 2, (5, 5), batch=1, kernel=(5, 5), padding=(0, 0), w_bits=8, a_bits=8)


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *CONTENDERS])
def test_overflow_corner(backend: str, device: str) -> None:
    x = torch.full((1, 5, 5, 1321), 255, dtype=torch.uint8)
    w = torch.full((2, 5, 5, 1321), 255, dtype=torch.uint8)
    w[1] = 0
    largest = 255 * 255 * 33025
    # float32 holds 24 bits of the accumulator; the bias brings the rest to light.
    bias = torch.tensor([-float(largest), float(largest)])
    y = one_step.conv(x, pack_weights(w, 8), torch.ones(2), bias, **CORNER.geometry()).run(backend, device)
    exact = torch.tensor([float(largest), -float(largest)])
    assert_same(y.flatten(), fma32(exact, torch.ones(2), bias), "y")
    if backend == "reference":
        acc = operations.accumulate(x, pack_weights(w, 8), CORNER.window(), **CORNER.reading())
        assert acc.flatten().tolist() == [largest, -largest]


def test_one_product_more_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 16513, dtype=torch.uint8)
    planes = pack_weights(torch.zeros(1, 1, 2, 16513, dtype=torch.uint8), 8)
    with pytest.raises(FormatError, match=r"33026 products .* 2147515650"):
        one_step.conv(x, planes, a_bits=8, kernel=(1, 2)).run("auto")
    with pytest.raises(FormatError, match=r"33026 products .* 2147515650"):
        operations.accumulate(x, planes, Window((1, 2)), a_bits=8)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_batch(backend: str) -> None:
    case = Case("empty", 5, 7, (6, 5), batch=0, stride=(2, 2))
    x, _, planes, multiplier, bias = operands(case)
    y = one_step.conv(x, planes, multiplier, bias, **case.geometry()).run(backend)
    assert y.shape == (0, 3, 3, 7)
    assert y.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_codes": torch.zeros(1, 4, 4, 40, dtype=torch.uint8)},
            r"int32 \(4, 4, 9, 1\); the step needs int32 \(4, 4, 9, 2",
        ),
        ({"x_codes": torch.zeros(1, 2, 4, 8, dtype=torch.uint8)}, "height = 0"),
        ({"kernel": (2, 2)}, r"the step needs int32 \(4, 4, 4, 1\)"),
        ({"kernel": (0, 3)}, r"kernel \(0, 3\); sizes are 1 to"),
        ({"kernel": (1, 9), "padding": (-1, 4)}, r"padding \(-1, 4\); it is 0 to"),
        ({"groups": 3}, "groups divide"),
        ({"groups": 0}, "groups divide"),
        ({"a_bits": 9}, "9 bits"),
        ({"zero": 16}, "zero = 16"),
        ({"signed": True, "padding": (1, 1)}, "pads signed codes"),
        ({"signed": True, "zero": 3}, "signed with zero = 3"),
        ({"multiplier": torch.ones(3)}, r"'m' is float32 \(3,\); the step needs float32 \(4,\)"),
        ({"bias": torch.ones(4, dtype=torch.int32)}, "'b' is int32"),
        ({"planes": torch.zeros(4, 4, 9, 1)}, "needs int32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x_codes": torch.zeros(1, 4, 4, 8, dtype=torch.uint8),
        "planes": torch.zeros(4, 4, 9, 1, dtype=torch.int32),
        "a_bits": 4,
        "kernel": (3, 3),
    }
    assert one_step.conv(**arguments).run("auto").shape == (1, 2, 2, 4)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        one_step.conv(**{**arguments, **change}).run("auto")  # type: ignore[arg-type]


def test_the_definition_refuses_padding_without_a_code_for_it() -> None:
    x, window = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), Window((3, 3), padding=(1, 1))
    planes = pack_weights(torch.zeros(2, 3, 3, 3, dtype=torch.uint8), 4)
    with pytest.raises(ShapeError, match=r"padding \(1, 1\) of signed codes"):
        operations.accumulate(x, planes, window, a_bits=4, signed=True)
