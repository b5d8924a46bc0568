"""Winograd convolution of the native runner: equal to the reference wherever it may serve, refused where it may not."""

from __future__ import annotations

import pytest
import torch
from programs import CASES, coded_sums, one_conv, random_program
from test_native_lean import RESIDUALS, RESULTS, net
from test_native_program import ISAS, check
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.planes import pack_weights, unpack_weights
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Program, Step, build_blob
from lbs_kernels.run.cpu import CpuRunner

# With AMX products are cheap and transforms are not: there the direct kernel serves.
WINOGRAD_ISAS = [isa for isa in ISAS if not isa.startswith("amx")]
# 2G of F(2x2, 3x3).
G2 = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])


def transforms(program: Program, blob: Tensor, step: ConvStep) -> Tensor:
    """(2G) g (2G)^T, int64 [O, C, 4, 4], by its definition."""
    spec = program.arrays[step.planes]
    count = 4 * int(torch.tensor(spec.shape).prod())
    planes = blob[spec.offset : spec.offset + count].clone().view(torch.int32).view(spec.shape)
    channels = program.tensors[step.input].channels
    codes = unpack_weights(planes, channels).to(torch.int64).unflatten(1, (3, 3)).permute(0, 3, 1, 2)  # [O, C, 3, 3]
    weights = 2 * codes - (2**step.w_bits - 1) if step.w_grid == "odd" else codes - 2 ** (step.w_bits - 1)
    return G2 @ weights @ G2.T


def suits(program: Program, blob: Tensor, step: Step, isa: str) -> bool:
    """The rule, in words of its own: 3x3, stride 1, transforms that are bytes, and pairs of products within 16 bits."""
    if not isinstance(step, ConvStep) or step.kernel != (3, 3) or step.groups != 1:
        return False
    source = program.tensors[step.input]
    if step.stride != (1, 1) or step.dilation != (1, 1) or step.w_bits == 8 or source.bits > 6:
        return False
    largest = int(transforms(program, blob, step).abs().max())
    return largest <= 127 and (isa != "avx2" or 8 * largest * (2**source.bits - 1) <= 32767)


def algorithms(program: Program, blob: Tensor, isa: str) -> list[str]:
    """Winograd for every step it may serve, the direct kernel for the rest."""
    return ["winograd" if suits(program, blob, step, isa) else "" for step in program.steps]


def check_winograd(program: Program, blob: Tensor, isa: str, **how: object) -> None:
    chosen = algorithms(program, blob, isa)
    assert "winograd" in chosen, "a test of nothing"
    check(program, blob, isa, algorithms=chosen, **how)  # type: ignore[arg-type]


# A vector is 16 tiles (8 with AVX2), so 32 columns; rows of tiles share vectors; pixels of a chunk begin at a vector.
SHAPES = {
    "one_pixel": {"channels": 5, "filters": 4, "size": (1, 1)},
    "one_row": {"channels": 5, "filters": 4, "size": (1, 33)},
    "one_column": {"channels": 7, "filters": 6, "size": (20, 1)},
    "whole_vectors": {"channels": 16, "filters": 16, "size": (4, 32)},
    "a_column_more": {"channels": 12, "filters": 12, "size": (5, 33)},
    "a_column_less": {"channels": 12, "filters": 20, "size": (6, 31)},
    "seven": {"channels": 64, "filters": 13, "size": (7, 7)},
    "fourteen": {"channels": 24, "filters": 36, "size": (14, 14)},
    "rows_that_share_vectors": {"channels": 9, "filters": 8, "size": (13, 6)},
    "several_chunks": {"channels": 64, "filters": 24, "size": (56, 56)},
    "chunks_of_odd_rows": {"channels": 130, "filters": 4, "size": (35, 27)},
    "a_chunk_wider_than_the_cache": {"channels": 132, "filters": 8, "size": (3, 260)},
    "filters_between_blocks": {"channels": 8, "filters": 44, "size": (8, 8)},
    "no_padding": {"channels": 8, "filters": 8, "size": (9, 12), "padding": (0, 0)},
    "more_padding_than_needed": {"channels": 4, "filters": 4, "size": (4, 5), "padding": (3, 2)},
}


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, isa: str) -> None:
    shape = SHAPES[name]
    large = shape["channels"] * shape["size"][0] * shape["size"][1] > 20000  # type: ignore[index, operator]
    for grid, a_bits, zero in (("zero", 4, 0), ("odd", 4, 9)):
        program, blob = one_conv(3, w_bits=3, a_bits=a_bits, zero=zero, grid=grid, **shape)  # type: ignore[arg-type]
        check_winograd(program, blob, isa, batches=(1,) if large else (1, 3), threads=(1, 2, 3), share=0.1)


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
@pytest.mark.parametrize("a_bits", range(1, 7))
def test_every_pair_of_bits(a_bits: int, isa: str) -> None:
    served = 0
    for w_bits in range(1, 8):
        for grid, signed in (("odd", False), ("zero", False), ("odd", True)):
            if signed and a_bits == 1:
                continue
            program, blob = one_conv(
                w_bits,
                channels=10,
                filters=12,
                size=(6, 7),
                w_bits=w_bits,
                a_bits=a_bits,
                signed=signed,
                padding=(0, 0) if signed else (1, 1),
                out_bits=8,
                grid=grid,
            )
            if "winograd" in algorithms(program, blob, isa):
                check_winograd(program, blob, isa, batches=(1,), threads=(1,), share=0.0)
                served += 1
    assert served >= (7 if a_bits == 1 else 10)  # widths up to 4 bits at least, on both grids and signed


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
@pytest.mark.parametrize("case", ["chain", "weights_with_a_zero", "preact_residual_float16", "gated", "concatenated"])
def test_whatever_an_epilogue_does(case: str, isa: str) -> None:
    program, blob = CASES[case](11)
    check_winograd(program, blob, isa, batches=(1, 3), share=0.0)


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
@pytest.mark.parametrize("size", [(9, 7), (3, 33), (14, 14)])
def test_residuals_of_codes(size: tuple[int, int], isa: str) -> None:
    check_winograd(*coded_sums(24, size, "1x1"), isa, batches=(1, 3), share=0.0)


# Filters (a part of a vector, blocks of two and three vectors), maps (of 16, 35, 49 tiles, and 210 in several chunks,
# rows of odd width and height), and the window of what reads the codes.
ON_THE_LANES = (
    (48, (7, 7), {}),
    (20, (14, 9), {"kernel": (1, 1), "padding": (0, 0)}),
    (80, (13, 14), {"stride": (2, 2)}),
    (16, (27, 30), {}),
)


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_many_channels(residual: str, results: str, isa: str) -> None:
    """From 128 channels on filters lie on the lanes where what is made of sums can be made so (AVX-512)."""
    bounds = ((0.0, None), (None, 0.75), (-0.5, 1.0), (None, None))
    for (filters, size, reader), bound, zero in zip(ON_THE_LANES, bounds, (0, 93, 200, 0), strict=True):
        program, blob = net((128, filters, 3), residual, results, size, bound, zero, w_bits=4, a_bits=4, **reader)
        check_winograd(program, blob, isa, batches=(2,), threads=(1, 2), share=0.0)


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
def test_random_programs(isa: str) -> None:
    served = 0
    for seed in range(24):
        program, blob = random_program(seed)
        if "winograd" in algorithms(program, blob, isa):
            check_winograd(program, blob, isa, batches=(1, 2), share=0.0)
            served += 1
    assert served >= 6


def posed(weights: Tensor, w_bits: int, a_bits: int) -> tuple[Program, Tensor]:
    """A layer of 8x8 pixels with these weight codes [O, 3, 3, C], whose codes are stored as they come."""
    filters, _, _, channels = weights.shape
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    problem = Problem("bitconv2d", 1, 8, 8, channels, filters, *geometry, w_bits, a_bits)
    program, blob = layer_program(problem)
    arrays = {
        "planes": pack_weights(weights, w_bits),
        "multiplier": torch.full((filters,), 1.0 / 512),
        "bias": torch.full((filters,), float(2 ** (a_bits - 1))),
    }
    specs, blob, digest = build_blob(arrays)
    assert specs == program.arrays
    return Program(program.tensors, program.steps, program.inputs, program.outputs, specs, digest=digest), blob


def largest_that_fits(w_bits: int) -> Tensor:
    """Codes [2, 3, 3, 4] of odd weights whose transform reaches +127 and -127."""
    top = 2**w_bits - 1
    weights = torch.full((3, 3), top)
    weights[1, 1] = 127 - 8 * top  # the sum of nine
    both = torch.stack((weights, -weights))
    return ((both + top) // 2).to(torch.uint8)[..., None].expand(2, 3, 3, 4).contiguous()


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
def test_the_largest_transforms(isa: str) -> None:
    program, blob = posed(largest_that_fits(4), 4, 4)
    step = program.steps[[step.name for step in program.steps].index(LAYER)]
    assert sorted({int(v) for v in transforms(program, blob, step).flatten().aminmax()}) == [-127, 127]  # type: ignore[arg-type]
    # Codes that make V largest and smallest: all high; rows, columns and checks of high and low.
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = [torch.ones(8, 8), y % 2, x % 2, (x + y) % 2, (x // 2) % 2, (y // 2) % 2, ((x // 2) + (y // 2)) % 2]
    for pattern in patterns:
        image = pattern.float().expand(1, 4, 8, 8).contiguous()
        truth: dict[int, Tensor] = {}
        found: dict[int, Tensor] = {}
        CpuRunner(program, blob, isa, {LAYER: "direct"}).run([image], truth)
        CpuRunner(program, blob, isa, {LAYER: "winograd"}).run([image], found)
        assert all(torch.equal(found[index], truth[index]) for index in truth)
    check(program, blob, isa, batches=(1,), share=0.0, algorithms=algorithms(program, blob, isa))


@pytest.mark.parametrize("isa", WINOGRAD_ISAS)
def test_a_transform_that_is_no_byte_takes_the_direct_kernel(isa: str) -> None:
    weights = largest_that_fits(4)
    weights[0, 1, 1] += 1  # 129
    program, blob = posed(weights, 4, 4)
    assert CpuRunner(program, blob, isa).native.algorithms[1] == "direct"
    check(program, blob, isa, batches=(1,), share=0.0)
    assert CpuRunner(program, blob, isa, {LAYER: "winograd-or-direct"}).native.algorithms[1] == "direct"
    with pytest.raises(BackendError, match=f"step '{LAYER}' cannot be computed by 'winograd'"):
        CpuRunner(program, blob, isa, {LAYER: "winograd"})


def test_an_unknown_algorithm_is_refused() -> None:
    program, blob = one_conv(1, channels=4, filters=4, size=(4, 4), w_bits=2, a_bits=2)
    text = program.to_json()
    with pytest.raises(BackendError, match="algorithm 'fft' is unknown; use 'direct', 'lanes', 'winograd'"):
        extension.cpu.Program(text, blob.data_ptr(), blob.numel(), "auto", ["fft"] * len(program.steps))
    with pytest.raises(BackendError, match="algorithms has 1 entries for 2 steps"):
        extension.cpu.Program(text, blob.data_ptr(), blob.numel(), "auto", [""])


@pytest.mark.skipif("avx512vnni" not in ISAS, reason="this processor lacks AVX-512 VNNI")
def test_the_faster_one_is_chosen() -> None:
    chosen = {}
    for channels, size in ((16, 32), (64, 56), (128, 28), (512, 7)):
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        problem = Problem("bitconv2d", 1, size, size, channels, channels, *geometry, 4, 4)
        program, blob = layer_program(problem)
        chosen[channels] = CpuRunner(program, blob, "avx512vnni").native.algorithms[1]
    assert chosen == {16: "direct", 64: "winograd", 128: "winograd", 512: "winograd"}
