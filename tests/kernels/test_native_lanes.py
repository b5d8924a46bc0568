"""Convolutions with filters on the lanes: equal to the reference, chosen for maps of few pixels, refused elsewhere."""

from __future__ import annotations

import pytest
from programs import CASES, one_conv
from test_native_lean import RESIDUALS, RESULTS, net
from test_native_program import ISAS, check

from lbs_kernels.errors import BackendError
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Program
from lbs_kernels.run.cpu import CpuRunner

LANES_ISAS = [isa for isa in ISAS if not isa.startswith("amx")]  # tiles of sums have pixels on their columns


def algorithms(program: Program) -> list[str]:
    """Filters on the lanes wherever they may be; all images here are small."""
    return [
        "lanes" if isinstance(s, ConvStep) and s.groups == 1 and (s.w_bits < 8 or s.w_grid == "zero") else ""
        for s in program.steps
    ]


# Groups of 7 pixels (5, 4), blocks of 48 filters (16): one less and more; strides and rows that pixels jump over.
SHAPES = {
    "seven": {"channels": 24, "filters": 48, "size": (7, 7)},
    "a_pixel_more": {"channels": 12, "filters": 49, "size": (5, 10)},
    "one_row": {"channels": 5, "filters": 96, "size": (1, 15)},
    "one_column": {"channels": 7, "filters": 6, "size": (20, 1)},
    "one_pixel_of_many": {"channels": 9, "filters": 33, "size": (3, 3), "padding": (0, 0)},
    "fourteen": {"channels": 16, "filters": 20, "size": (14, 14)},
    "the_most_pixels": {"channels": 3, "filters": 17, "size": (16, 16)},
    "stride_2": {"channels": 13, "filters": 32, "size": (13, 11), "stride": (2, 2)},
    "stride_of_rows_only": {"channels": 10, "filters": 14, "size": (9, 18), "stride": (2, 1)},
    "points": {"channels": 70, "filters": 50, "size": (7, 7), "kernel": (1, 1), "padding": (0, 0)},
    "points_of_stride_2": {
        "channels": 9,
        "filters": 40,
        "size": (14, 13),
        "kernel": (1, 1),
        "stride": (2, 2),
        "padding": (0, 0),
    },
    "dilated": {"channels": 8, "filters": 8, "size": (12, 13), "dilation": (2, 3), "padding": (2, 3)},
    "even_kernel": {"channels": 6, "filters": 8, "size": (6, 9), "kernel": (2, 4), "padding": (1, 2)},
}


@pytest.mark.parametrize("isa", LANES_ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, isa: str) -> None:
    for w_bits, a_bits, zero, grid in ((4, 4, 0, "odd"), (8, 8, 101, "zero"), (2, 8, 0, "zero")):
        program, blob = one_conv(3, w_bits=w_bits, a_bits=a_bits, zero=zero, grid=grid, **SHAPES[name])  # type: ignore[arg-type]
        chosen = algorithms(program)
        assert "lanes" in chosen
        check(program, blob, isa, batches=(1, 3), threads=(1, 2, 3), algorithms=chosen)


@pytest.mark.parametrize("isa", LANES_ISAS)
@pytest.mark.parametrize("case", ["chain", "weights_with_a_zero", "preact_residual_float16", "gated", "many_consumers"])
def test_whatever_an_epilogue_does(case: str, isa: str) -> None:
    program, blob = CASES[case](11)
    chosen = algorithms(program)
    assert "lanes" in chosen
    check(program, blob, isa, batches=(1, 3), algorithms=chosen)


# Rows of whole groups of pixels, rows that end within four pixels, pixels side by side, and columns that lie apart.
READERS = {"rows": {}, "one row": {"kernel": (1, 1), "padding": (0, 0)}, "columns apart": {"stride": (2, 2)}}


@pytest.mark.parametrize("isa", LANES_ISAS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_is_made_of_sums_as_they_lie(residual: str, results: str, reader: str, isa: str) -> None:
    """Streams of 48 filters are made so, of 12 they are turned; codes always are, groups of four that end a vector."""
    for layer in ("3x3, 48 filters", "1x1, 16 steps"):
        for size, bounds, zero in (((7, 7), (0.0, None), 0), ((5, 10), (None, 0.75), 93), ((2, 31), (-0.5, 1.0), 200)):
            program, blob = net(layer, residual, results, size, bounds, zero, w_bits=4, **READERS[reader])
            chosen = algorithms(program)
            assert "lanes" in chosen
            check(program, blob, isa, batches=(2,), threads=(1, 2), share=0.0, algorithms=chosen)


@pytest.mark.parametrize("isa", LANES_ISAS)
def test_signed_codes(isa: str) -> None:
    shape = {"channels": 9, "filters": 21, "size": (5, 5), "padding": (0, 0)}
    program, blob = one_conv(5, w_bits=4, a_bits=5, signed=True, **shape)  # type: ignore[arg-type]
    check(program, blob, isa, batches=(2,), algorithms=algorithms(program))


@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 4, "filters": 4, "size": (17, 61)},  # too many pixels
        {"channels": 8, "filters": 8, "size": (4, 4), "groups": 2},
        {"channels": 4, "filters": 4, "size": (4, 4), "w_bits": 8},  # sums of codes
    ],
)
def test_what_it_does_not_take_is_refused(shape: dict[str, object]) -> None:
    program, blob = one_conv(1, **{"w_bits": 4, "a_bits": 4, **shape})  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="cannot be computed by 'lanes'"):
        CpuRunner(program, blob, "auto", {step.name: "lanes" for step in program.steps})


@pytest.mark.skipif("avx512vnni" not in ISAS, reason="this processor lacks AVX-512 VNNI")
def test_it_is_chosen_where_vectors_of_pixels_would_be_part_empty() -> None:
    chosen = {}
    for channels, size, kernel in ((512, 7, 3), (2048, 7, 1), (96, 14, 1), (64, 16, 3), (64, 56, 3)):
        geometry = ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
        problem = Problem("bitconv2d", 1, size, size, channels, 512, *geometry, 8, 8)
        program, blob = layer_program(problem)
        index = [step.name for step in program.steps].index(LAYER)
        chosen[channels, size] = CpuRunner(program, blob, "avx512vnni").native.algorithms[index]
    assert chosen == {
        (512, 7): "lanes",
        (2048, 7): "lanes",
        (96, 14): "direct",
        (64, 16): "direct",
        (64, 56): "direct",
    }
