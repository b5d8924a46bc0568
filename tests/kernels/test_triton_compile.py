"""The Triton kernels compiled ahead of time: INT8 tensor cores are used, nothing spills, nothing is contracted.

No GPU is needed: launches go through Triton's own argument binder, compiler and ptxas, for sm_80 and sm_90. What is
found: `mma.sync.m16n8k32 ... s32.s8.s8.s32` on sm_80; on sm_90 `wgmma.mma_async ... s32.s8.s8` for tiles with at least
64 rows of operand A, and `mma.sync` below.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS, compiling
from compiled_layers import (
    check_exact,
    check_gemm,
    check_layouts,
    check_operands,
    check_order,
    compile_problem,
    compile_steps,
    launches,
    square,
)
from disassembly import SPLIT, Loop, instructions, main_loop, neighbours_in_a_thread, packed_layouts
from s8_cases import as_nibbles

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, column_rows
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.forms import as_kept
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.gpu.stem import fold_stem
from lbs_kernels.gpu.stem_pool import pool_stems
from lbs_kernels.program.problem import problem_of
from lbs_kernels.program.steps import Emit, QuantPackStep, ResizeStep, SelectStep

TARGET = pytest.mark.parametrize("target", sorted(TARGETS))
DIVISION_FREE = ("elu", "hardsigmoid", "hardswish", "leaky_relu", "prelu")
HOPPER_FIRST = pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])


# A middle layer of ResNet-18 at batch 32 with the configuration shipped for it.
@TARGET
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (4, 4), (8, 8)])
def test_convolution_uses_int8_tensor_cores(w_bits: int, a_bits: int, target: str, tmp_path: Path) -> None:
    conv = compile_problem(square(128, 128, 28, 3, 32, w_bits, a_bits), target, tmp_path)
    check_gemm(conv, "wgmma" if target == "sm_90" else "mma.sync")
    if target == "sm_90":
        check_operands(conv)


@TARGET
def test_small_tiles_use_mma_sync(target: str, tmp_path: Path) -> None:
    pruned = square(16, 13, 8, 3, 1, 4, 2)  # CIFAR ResNet, batch 1
    check_gemm(compile_problem(pruned, target, tmp_path), "mma.sync")


@TARGET
def test_every_kind_of_step_compiles(target: str, tmp_path: Path) -> None:
    program, blob = programs.imagenet_stem(0)
    kernels = compile_steps(program, blob, 2, target, tmp_path)
    assert {kernel.name for kernel in kernels} == {
        "quantpack_kernel", "gemm_kernel", "max_planes_kernel", "max_stream_kernel", "mean_kernel",
    }  # fmt: skip
    for kernel in kernels:
        check_order(kernel, target)
        if kernel.name == "gemm_kernel":
            check_gemm(kernel, "mma.sync" if "wgmma" not in kernel.ptx else "wgmma")
        else:
            check_exact(kernel)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_loaded_as_bytes_and_normalised_by_one_instruction(
    layout: torch.memory_format, tmp_path: Path
) -> None:
    program, blob = programs.byte_image(0)
    kernels = compile_steps(program, blob, 2, "sm_90", tmp_path, layout=layout)
    for step, kernel in zip(program.steps, kernels, strict=True):
        check_exact(kernel)
        if isinstance(step, QuantPackStep):
            loads_bytes = re.search(r"ld\.global\.(v\d\.)?b8", kernel.ptx) is not None
            assert loads_bytes is (program.tensors[step.input].dtype == "uint8")
            assert ("fma.rn.f32" in kernel.ptx) is (step.multiplier is not None)


# Sizes of 1 are constants to the compiler, which the interpreter does not know: one channel, one pixel, one filter.
@pytest.mark.parametrize("a_bits", [2, 8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_sizes_of_one_compile(kernel: int, a_bits: int, tmp_path: Path) -> None:
    for number, (channels, filters, size) in enumerate([(1, 8, 6), (8, 1, 6), (1, 1, 1), (8, 8, 1)]):
        layer = square(channels, filters, size, kernel, 1, 4, a_bits)
        check_exact(compile_problem(layer, "sm_90", tmp_path / str(number)))


@pytest.mark.parametrize("case", ["one_pixel", "chain", "averaged"])
def test_small_programs_compile(case: str, tmp_path: Path) -> None:
    program, blob = programs.CASES[case](0)
    for number, launch in enumerate(launches(program, blob, 1)):
        with compiling("sm_90", tmp_path / str(number)):  # two steps may share a kernel, and each wants its log
            launch(programs.random_inputs(program, 1, 0))


@pytest.mark.parametrize(
    "case",
    [
        "concatenated",
        "concatenated_bytes",
        "selected_streams_bfloat16",
        "interpolated",
        "interpolated_float16",
        "moved",
        "moved_streams",
    ],
)
def test_selections_and_interpolation_compile(case: str, tmp_path: Path) -> None:
    program, blob = programs.CASES[case](0)
    for number, (step, launch) in enumerate(zip(program.steps, launches(program, blob, 2), strict=True)):
        if isinstance(step, SelectStep | ResizeStep):
            with compiling("sm_90", tmp_path / str(number)) as found:
                launch(programs.random_inputs(program, 2, 0))
            (kernel,) = found
            check_exact(kernel)


@pytest.mark.slow
@TARGET
@pytest.mark.parametrize("case", ["normed_stream", "depthwise", "preact_residual_bfloat16", "preact_residual_float16"])
def test_other_programs_compile(case: str, target: str, tmp_path: Path) -> None:
    program, blob = programs.CASES[case](0)
    for kernel in compile_steps(program, blob, 2, target, tmp_path):
        check_exact(kernel)


@HOPPER_FIRST
@pytest.mark.parametrize("case", ["activated", "gated"])
def test_activations_divide_correctly_rounded(case: str, target: str, tmp_path: Path) -> None:
    program, blob = programs.CASES[case](0)
    divides = 0
    for step, kernel in zip(program.steps, compile_steps(program, blob, 2, target, tmp_path), strict=True):
        check_exact(kernel)
        assert not re.search(r"div\.(full|approx)|\b(ex2|rcp|tanh)\.", kernel.ptx), kernel.name
        dividing = step.emit.activation is not None and step.emit.activation.kind not in DIVISION_FREE
        assert ("div.rn.f32" in kernel.ptx) is dividing
        divides += dividing
    assert divides > 1


def test_nothing_is_contracted_that_the_epilogue_rounds_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """t = u * scale; t = t + n / 2 are two roundings: no FFMA may appear in the machine code."""
    b = programs.Builder(seed=0)
    image = b.image(3, 8, 8)
    codes = b.consumer((8, 8, 3), 8, signed=True)
    b.quantize(image, Emit(stream=b.stream((8, 8, 3), output=True), consumers=(codes,)))
    program, blob = b.build()
    (kernel,) = compile_steps(program, blob, 2, "sm_90", tmp_path / "shipped")
    assert "FMUL" in kernel.sass
    assert "FADD" in kernel.sass
    assert "FFMA" not in kernel.sass
    # The same kernel without the option is contracted: the assertion above can fail.
    from lbs_kernels.gpu.triton import quantpack

    monkeypatch.setattr(quantpack, "LAUNCH_OPTIONS", {"enable_fp_fusion": True})
    (fused,) = compile_steps(program, blob, 2, "sm_90", tmp_path / "fused")
    assert "FFMA" in fused.sass


@TARGET
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pixels_of_a_mean_are_on_their_way_before_one_is_added(dtype: str, target: str, tmp_path: Path) -> None:
    """Copies of seven pixels stand in front of the loop, which waits for the oldest alone."""
    b = programs.Builder(0, dtype)
    stream, mean = b.stream((7, 7, 512)), b.consumer((1, 1, 512), 8)
    b.quantize(b.image(512, 7, 7), Emit(stream=stream))
    b.pool(stream, Emit(consumers=(mean,)), "mean")
    b.linear(mean.tensor, Emit(stream=b.stream((1, 1, 10), output=True, flat=True)), 10, w_bits=8)
    (kernel,) = (one for one in compile_steps(*b.build(), 1, target, tmp_path) if one.name == "mean_kernel")
    check_exact(kernel)
    before, _, behind = kernel.ptx.partition("add.rn.f32")
    assert len(re.findall("cp.async.commit_group", before)) >= 7
    assert re.search(r"cp\.async\.wait_group\s+6", before)
    assert "ld.global.v" not in behind.partition("st.global")[0]


def test_fused_multiply_add_is_one_instruction(tmp_path: Path) -> None:
    conv = compile_problem(square(32, 32, 8, 3, 1, 4, 4), "sm_80", tmp_path)
    assert "fma.rn.f32" in conv.ptx
    assert "FFMA" in conv.sass


# Instructions of the loop for 128 x 128 x 128 products, which take the tensor core 512 clocks at best; each of its four
# schedulers issues them for two warps. The limits are what Triton 3.7 makes plus a tenth; 3.5 and 3.6 keep them too.
@pytest.mark.parametrize(
    ("bits", "kernel", "limit"),
    [
        ((4, 4), 3, 240),
        pytest.param((2, 2), 3, 190, marks=pytest.mark.slow),
        pytest.param((8, 8), 1, 200, marks=pytest.mark.slow),
    ],
)
def test_the_loop_is_short(bits: tuple[int, int], kernel: int, limit: int, tmp_path: Path) -> None:
    layer = square(256, 256, 28, kernel, 32, *bits)
    assert str(conv_default(layer)).startswith("gemm_m128_o128_k128_w8")
    compiled = compile_problem(layer, "sm_90", tmp_path)
    check_operands(compiled)
    loop = main_loop(compiled)
    assert loop.products == 4  # 64 x 128 x 32 each, of 128 x 128 x 128 in two warp groups
    assert len(loop.instructions) <= limit
    assert loop.count(r"LDGSTS") > 0, "loads are not asynchronous"
    assert loop.count(r"LDG\.") == 0
    wide = loop.count(r"LDGSTS\.E\.(BYPASS\.)?(64|128)")
    assert wide == loop.count("LDGSTS")


def test_bytes_of_another_thread_would_be_noticed(tmp_path: Path) -> None:
    """The check of the layouts can fail, and there is something to check."""
    kernel = compile_problem(square(64, 64, 56, 3, 32, 4, 4), "sm_90", tmp_path)
    assert len(packed_layouts(kernel, SPLIT)) == 2
    check_layouts(kernel)
    blocked = "#ttg.blocked<{sizePerThread = [1, 1, 2, 2], threadsPerWarp = [16, 2, 1, 1], warpsPerCTA = [4, 1, 1, 1], "
    assert neighbours_in_a_thread(blocked + "order = [3, 2, 1, 0]}>", 2)
    assert not neighbours_in_a_thread(blocked + "order = [2, 3, 1, 0]}>", 2)
    assert not neighbours_in_a_thread(blocked.replace("1, 2, 2]", "4, 1, 1]") + "order = [3, 2, 1, 0]}>", 2)
    assert neighbours_in_a_thread("#ttg.linear<{register = [[0, 0, 0, 1], [0, 0, 1, 0], [8, 0, 0, 0]], lane = ", 2)
    assert not neighbours_in_a_thread("#ttg.linear<{register = [[0, 0, 0, 1], [8, 0, 0, 0], [0, 0, 1, 0]], lane = ", 2)
    assert neighbours_in_a_thread("#ttg.blocked<{sizePerThread = [1, 16], warps = [4, 1], order = [1, 0]}>", 1)
    assert not neighbours_in_a_thread("#ttg.blocked<{sizePerThread = [4, 1], warps = [4, 1], order = [0, 1]}>", 1)


@HOPPER_FIRST
def test_parts_of_a_reduction_meet_by_atomics(target: str, tmp_path: Path) -> None:
    layer = square(512, 512, 7, 3, 1, 4, 4)
    assert conv_default(layer).split_k == 16
    kernel = compile_problem(layer, target, tmp_path)
    check_gemm(kernel, "wgmma" if target == "sm_90" else "mma.sync")
    assert "atom.global.gpu.acq_rel.add" in kernel.ptx
    assert re.search(r"(red|atom)\.global\.gpu\.relaxed\.add", kernel.ptx)


@HOPPER_FIRST
@pytest.mark.parametrize("bits", [(4, 4), pytest.param((8, 8), marks=pytest.mark.slow)])
def test_depthwise_multiplies_four_taps_at_once(bits: tuple[int, int], target: str, tmp_path: Path) -> None:
    kernel = compile_problem(replace(square(96, 96, 56, 3, 32, *bits), groups=96), target, tmp_path)
    check_exact(kernel)
    assert "dp4a.s32.s32" in kernel.ptx
    assert "prmt.b32" in kernel.ptx
    assert not re.search(r"LDG\.E\.[US]8", kernel.sass), "bytes are loaded one by one"


@TARGET
@pytest.mark.parametrize(
    ("channels", "bits", "limit"),
    [
        (16, (8, 8), 18.5),
        (24, (4, 4), 31.0),
        pytest.param(24, (2, 2), 27.0, marks=pytest.mark.slow),
        (64, (4, 4), 31.0),
    ],
)
def test_a_short_reduction_has_a_small_epilogue(
    channels: int, bits: tuple[int, int], limit: float, target: str, tmp_path: Path
) -> None:
    """What an inverted residual begins with: instructions of a thread for an output, and barriers."""
    filters = 6 * channels
    b = programs.Builder(0)
    codes, window = b.consumer((56, 56, channels), bits[1]), {"kernel": (1, 1), "padding": (0, 0)}
    b.quantize(b.image(channels, 56, 56), Emit(consumers=(codes,)))
    out = b.consumer((56, 56, filters), bits[1])
    grid = "zero" if bits[0] == 8 else "odd"
    b.conv(codes.tensor, Emit(low=0.0, high=6.0, consumers=(out,)), filters, w_bits=bits[0], grid=grid, **window)
    b.conv(out.tensor, Emit(stream=b.stream((56, 56, 8), output=True)), 8, w_bits=4, **window)
    program, blob = b.build()
    layer = problem_of(program.steps[1], program, 32, "cpu")
    config = conv_default(layer)
    assert isinstance(config, GemmConfig)
    assert (config.block_m, config.block_o, config.warps) == (256, 32, 4)
    with compiling(target, tmp_path) as kernels:
        launches(program, blob, 32)[1]([])
    (kernel,) = kernels
    check_gemm(kernel, "wgmma" if target == "sm_90" else "mma.sync")
    check_layouts(kernel)
    code = Loop(tuple(text for _, text in instructions(kernel)))
    tiles = -(-layer.rows // config.block_m) * -(-filters // config.block_o)
    useful = layer.rows * filters / tiles / (32 * config.warps)
    assert len(code.instructions) / useful <= limit
    assert code.count("BAR") <= 12


@TARGET
@pytest.mark.parametrize(("stride", "limit"), [(1, 15.5), (2, 20.0)])
def test_depthwise_by_columns_is_a_few_vector_instructions(
    stride: int, limit: float, target: str, tmp_path: Path
) -> None:
    """Of a layer of MobileNetV2: loads of 16 bytes, no shared memory, no barrier, and what an output takes in all."""
    b = programs.Builder(0)
    codes, window = b.consumer((56, 56, 96), 8), {"stride": (stride, stride), "groups": 96}
    b.quantize(b.image(96, 56, 56), Emit(consumers=(codes,)))
    out = b.consumer((56 // stride, 56 // stride, 96), 8)
    b.conv(codes.tensor, Emit(low=0.0, high=6.0, consumers=(out,)), 96, w_bits=8, grid="zero", **window)
    b.conv(out.tensor, Emit(stream=b.stream(b.shape(out.tensor), output=True)), 96, w_bits=8, grid="zero", groups=96)
    program, blob = b.build()
    layer = problem_of(program.steps[1], program, 128, "cpu")
    config = conv_default(layer)
    assert isinstance(config, DepthwiseConfig)
    assert config.columns == (8 if stride == 1 else 7)
    with compiling(target, tmp_path) as kernels:
        launches(program, blob, 128)[1]([])
    (kernel,) = kernels
    check_exact(kernel)
    code = Loop(tuple(text for _, text in instructions(kernel)))
    outputs = config.block_m * config.block_c * config.columns * column_rows(layer) / (32 * config.warps)
    assert len(code.instructions) / outputs < limit
    assert code.count("STS|LDS|BAR|LDL|STL") == 0
    assert code.count(r"LDG\.E\.128") > 0.8 * code.count("LDG")
    assert code.count("IDP") == 3 * outputs


CORNERS = [(64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 8), (256, 64, 4, 8), (256, 32, 4, 8), (32, 128, 4, 4)]


def corner_cases() -> list[tuple[int, int, GemmConfig]]:
    """The largest configurations that the rule allows: it claims that they do not spill."""
    cases = []
    for w_bits, a_bits in ((8, 8), (8, 2), (4, 4), (2, 8)):
        layer = square(128, 128, 28, 3, 32, w_bits, a_bits)
        for corner, first, weights in itertools.product(CORNERS, (True, False), ("bytes", "fields")):
            config = GemmConfig(*corner, stages=3, weights_first=first, weights=weights)
            if config.why_not(layer) is None:
                cases.append((w_bits, a_bits, config))
    return cases


@pytest.mark.slow
@TARGET
@pytest.mark.parametrize(("w_bits", "a_bits", "config"), corner_cases(), ids=str)
def test_largest_valid_configurations_do_not_spill(
    w_bits: int, a_bits: int, config: GemmConfig, target: str, tmp_path: Path
) -> None:
    kernel = compile_problem(square(128, 128, 28, 3, 32, w_bits, a_bits), target, tmp_path, config)
    assert kernel.spill_bytes == 0, f"{config}: {kernel.log}"
    check_layouts(kernel)


@TARGET
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_folded_stem_compiles(dtype: str, target: str, tmp_path: Path) -> None:
    program, blob = programs.stem(0, dtype, kernel=(7, 7), padding=(3, 3), size=(64, 64))
    kernels = compile_steps(*fold_stem(program, blob), batch=32, target=target, folder=tmp_path)
    assert [kernel.name for kernel in kernels] == ["quantpack_kernel", "gemm_kernel"]
    assert not any(kernel.spill_bytes for kernel in kernels)
    for kernel in kernels:
        check_layouts(kernel)


def test_narrow_codes_are_written_and_read_as_bytes(tmp_path: Path) -> None:
    program, blob = programs.CASES["chain"](seed=0)
    kept = as_kept(program, lambda problem: 1e-5 / problem.a_bits)
    assert kept != program
    kernels = compile_steps(kept, blob, batch=32, target="sm_90", folder=tmp_path)
    assert not any(kernel.spill_bytes for kernel in kernels)


def test_nibbles_are_written_without_spills(tmp_path: Path) -> None:
    """By a quantizer, a matrix product, a depthwise layer, and a stem with its maximum."""
    b = programs.Builder(0, "float16")
    size = (28, 28, 64)
    codes, narrow = b.consumer(size, 8), b.consumer(size, 4)
    b.quantize(b.image(64, 28, 28), Emit(consumers=(codes, narrow)))
    b.conv(codes.tensor, Emit(low=0.0, consumers=(b.consumer(size, 4),)), 64, w_bits=4)
    b.conv(codes.tensor, Emit(high=6.0, consumers=(b.consumer(size, 4),)), 64, w_bits=8, groups=64, grid="zero")
    stem, data = fold_stem(*programs.stem_and_maximum(0, size=(224, 224), filters=64, bits=4, stream_dtype="float16"))
    found = []
    for program, blob in (b.build(), (pool_stems(stem, data), data)):
        program = as_nibbles(program)
        assert any(spec.nibbles for spec in program.tensors)
        found += compile_steps(program, blob, batch=32, target="sm_90", folder=tmp_path)
    for kernel in found:
        check_exact(kernel)
    assert {"quantpack_kernel", "gemm_kernel", "stem_pool_kernel"} < {kernel.name for kernel in found}


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    program, blob = programs.one_pixel(0)
    with pytest.raises(BackendError, match=r"GPU kernels cannot run on cpu.*TRITON_INTERPRET=1"):
        GpuRunner(program, blob, "cpu")
