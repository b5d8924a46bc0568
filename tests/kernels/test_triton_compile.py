"""The Triton kernels compiled ahead of time: INT8 tensor cores are used, nothing spills, nothing is contracted.

No GPU is needed: launches go through Triton's own argument binder, compiler and ptxas, for sm_80 and sm_90. What is
found: `mma.sync.m16n8k32 ... s32.s8.s8.s32` on sm_80; on sm_90 `wgmma.mma_async ... s32.s8.s8` for tiles with at least
64 rows of operand A, and `mma.sync` below.
"""

from __future__ import annotations

import re
from pathlib import Path

import programs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS, Compiled, compiling

from lbs_kernels import triton_runner
from lbs_kernels.bitconv2d import tuning as conv_tuning
from lbs_kernels.errors import BackendError
from lbs_kernels.gemm_config import GemmConfig
from lbs_kernels.problem import Problem
from lbs_kernels.program import IMAGE_DTYPES, Emit, Program, QuantPackStep
from lbs_kernels.triton_common import INTERPRETED
from lbs_kernels.triton_runner import TritonRunner

INT8 = {
    "mma.sync": r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32",
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
}
BITS = (2, 4, 8)
TARGET = pytest.mark.parametrize("target", sorted(TARGETS))


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a runner be built on CPU tensors although nothing is interpreted: its launches are compiled only."""

    class Yes:
        value = True

    assert not INTERPRETED.value
    monkeypatch.setattr(triton_runner, "INTERPRETED", Yes)


def compile_steps(
    program: Program,
    blob: torch.Tensor,
    batch: int,
    target: str,
    folder: Path,
    configs: dict[str, GemmConfig] | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Compiled]:
    """Every launch of the program at one batch size, compiled."""
    launches = TritonRunner(program, blob, "cpu", configs).plan(batch).launches
    images = []
    for spec in (program.tensors[index] for index in program.inputs):
        image = torch.empty(batch, spec.channels, spec.height, spec.width, dtype=IMAGE_DTYPES[spec.dtype])
        images.append(image.contiguous(memory_format=layout))
    with compiling(target, folder) as kernels:
        for launch in launches:
            launch(images)
    assert len(kernels) == len(program.steps)
    return kernels


def layer(
    channels: int, filters: int, size: int, w_bits: int, a_bits: int, kernel: int = 3
) -> tuple[Program, torch.Tensor]:
    return programs.one_conv(
        0,
        channels=channels,
        filters=filters,
        size=(size, size),
        w_bits=w_bits,
        a_bits=a_bits,
        out_bits=a_bits,
        kernel=(kernel, kernel),
        padding=(kernel // 2, kernel // 2),
    )


def check_gemm(kernel: Compiled, instruction: str) -> None:
    assert re.search(INT8[instruction], kernel.ptx), f"no {instruction} with int8 operands in {kernel.name}"
    check_exact(kernel)


def check_exact(kernel: Compiled) -> None:
    """No spills, no flush of small numbers to zero."""
    assert kernel.spill_bytes == 0, kernel.log
    assert ".ftz" not in kernel.ptx


# A middle layer of ResNet-18 at batch 32 with the configuration shipped for it.
@TARGET
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (4, 4), (8, 8)])
def test_convolution_uses_int8_tensor_cores(w_bits: int, a_bits: int, target: str, tmp_path: Path) -> None:
    program, blob = layer(128, 128, 28, w_bits, a_bits)
    quantize, conv = compile_steps(program, blob, 32, target, tmp_path)
    check_exact(quantize)
    check_gemm(conv, "wgmma" if target == "sm_90" else "mma.sync")


@TARGET
def test_small_tiles_use_mma_sync(target: str, tmp_path: Path) -> None:
    program, blob = layer(16, 13, 8, 4, 2)  # CIFAR ResNet, pruned, batch 1
    _, conv = compile_steps(program, blob, 1, target, tmp_path)
    check_gemm(conv, "mma.sync")


@TARGET
def test_every_kind_of_step_compiles(target: str, tmp_path: Path) -> None:
    program, blob = programs.imagenet_stem(0)
    kernels = compile_steps(program, blob, 2, target, tmp_path)
    assert {kernel.name for kernel in kernels} == {
        "quantpack_kernel", "gemm_kernel", "max_codes_kernel", "max_stream_kernel", "mean_kernel",
    }  # fmt: skip
    for kernel in kernels:
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


@pytest.mark.slow
@TARGET
@pytest.mark.parametrize("case", ["normed_stream", "depthwise", "preact_residual_bfloat16", "preact_residual_float16"])
def test_other_programs_compile(case: str, target: str, tmp_path: Path) -> None:
    program, blob = programs.CASES[case](0)
    for kernel in compile_steps(program, blob, 2, target, tmp_path):
        check_exact(kernel)


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
    from lbs_kernels.quantpack import triton_impl

    monkeypatch.setattr(triton_impl, "LAUNCH_OPTIONS", {"enable_fp_fusion": True})
    (fused,) = compile_steps(program, blob, 2, "sm_90", tmp_path / "fused")
    assert "FFMA" in fused.sass


def test_fused_multiply_add_is_one_instruction(tmp_path: Path) -> None:
    program, blob = layer(32, 32, 8, 4, 4)
    _, conv = compile_steps(program, blob, 1, "sm_80", tmp_path)
    assert "fma.rn.f32" in conv.ptx
    assert "FFMA" in conv.sass


@pytest.mark.slow
@TARGET
@pytest.mark.parametrize("w_bits", BITS)
@pytest.mark.parametrize("a_bits", BITS)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (64, 56), (512, 7)])
def test_shipped_configurations(
    channels: int, size: int, batch: int, a_bits: int, w_bits: int, target: str, tmp_path: Path
) -> None:
    program, blob = layer(channels, channels, size, w_bits, a_bits)
    _, conv = compile_steps(program, blob, batch, target, tmp_path)
    check_gemm(conv, "wgmma" if "wgmma" in conv.ptx else "mma.sync")


CORNERS = [(128, 64, 2, 4), (64, 128, 2, 4), (128, 128, 2, 8), (256, 64, 2, 8), (128, 128, 4, 8), (32, 64, 4, 8)]


def corner_cases() -> list[tuple[int, int, GemmConfig]]:
    """The largest configurations that the rule allows: it claims that they do not spill."""
    cases = []
    for w_bits, a_bits in ((8, 8), (8, 2), (4, 4), (2, 8)):
        problem = Problem("bitconv2d", 32, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), w_bits=w_bits, a_bits=a_bits)
        for corner in CORNERS:
            for weights_first in (True, False):
                config = GemmConfig(*corner, stages=3, weights_first=weights_first)
                if conv_tuning.is_valid(config, problem):
                    cases.append((w_bits, a_bits, config))
    return cases


@pytest.mark.slow
@TARGET
@pytest.mark.parametrize(("w_bits", "a_bits", "config"), corner_cases(), ids=str)
def test_largest_valid_configurations_do_not_spill(
    w_bits: int, a_bits: int, config: GemmConfig, target: str, tmp_path: Path
) -> None:
    program, blob = layer(128, 128, 28, w_bits, a_bits)
    _, conv = compile_steps(program, blob, 32, target, tmp_path, {"step1": config})
    assert conv.spill_bytes == 0, f"{config}: {conv.log}"


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runner, "INTERPRETED", INTERPRETED)
    program, blob = programs.one_pixel(0)
    with pytest.raises(BackendError, match=r"triton cannot run on cpu.*TRITON_INTERPRET=1"):
        TritonRunner(program, blob, "cpu")
