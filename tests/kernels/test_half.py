"""The half-precision fallback: its kernels compile ahead of time, and on a GPU its codes differ by one at most.

What it computes is tested interpreted (interpreted/check_half.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import programs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS, Compiled, compiling
from compiled_layers import launches

from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.program.steps import ConvStep, LinearStep, Program
from lbs_kernels.run.reference import ReferenceRunner

TARGET = pytest.mark.parametrize("target", sorted(TARGETS))
TENSOR_CORE = r"mma\.sync|wgmma"


def check_layers(program: Program, blob: torch.Tensor, target: str, folder: Path) -> int:
    """Compiles every layer of a program in half precision; returns how many there are.

    The product between the two kernels is torch's, and with it the tensor cores. The kernels themselves must not
    spill, flush or contract, decode must round to float16 nowhere but at its end, and step 2 must be one instruction.
    """
    layers = {index: step.name for index, step in enumerate(program.steps) if isinstance(step, ConvStep | LinearStep)}
    steps = launches(program, blob, 2, {name: HalfConfig() for name in layers.values()})
    kernels: list[Compiled] = []
    for index in layers:
        with compiling(target, folder / str(index)) as found:  # two layers may share a kernel, and each wants its log
            steps[index]([])
        kernels += found
    assert [kernel.name for kernel in kernels] == ["decode_kernel", "finish_kernel"] * len(layers)
    for kernel in kernels:
        assert kernel.spill_bytes == 0, kernel.log
        assert ".ftz" not in kernel.ptx
        assert not re.search(TENSOR_CORE, kernel.ptx)
    for decode, finish in zip(kernels[::2], kernels[1::2], strict=True):
        assert re.search(r"cvt\.rn\.f16", decode.ptx)
        assert not re.search(r"(add|mul|sub|fma)\.(rn\.)?f16", decode.ptx)
        assert re.search(r"cvt\.f32\.f16", finish.ptx)
        assert "fma.rn.f32" in finish.ptx
    return len(layers)


@TARGET
@pytest.mark.parametrize("a_bits", [4, 8])
def test_its_kernels_compile_without_spills(a_bits: int, target: str, tmp_path: Path) -> None:
    program, blob = programs.one_conv(0, channels=40, filters=33, size=(6, 6), w_bits=4, a_bits=a_bits)
    assert check_layers(program, blob, target, tmp_path) == 1


# How codes are read: one plane, a word that ends in its middle, signed, a zero point. How they are written: widths of
# the next layer. 512 channels are the widest blocks there are.
@pytest.mark.slow
@TARGET
@pytest.mark.parametrize(
    "geometry",
    [
        {"a_bits": 1, "channels": 33, "out_bits": 1},
        {"a_bits": 2, "channels": 512, "filters": 512, "out_bits": 2},
        {"a_bits": 4, "signed": True, "padding": (0, 0), "out_bits": 8},
        {"a_bits": 8, "zero": 117, "channels": 3, "filters": 64},
        {"a_bits": 8, "signed": True, "padding": (0, 0), "stride": (2, 1), "filters": 1},
        {"a_bits": 8, "groups": 8, "channels": 64, "filters": 64, "out_bits": 8},
    ],
    ids=str,
)
def test_every_form_of_codes_compiles(geometry: dict[str, Any], target: str, tmp_path: Path) -> None:
    settings = {"channels": 40, "filters": 33, "size": (6, 6), "w_bits": 4, **geometry}
    program, blob = programs.one_conv(0, **settings)
    assert check_layers(program, blob, target, tmp_path) == 1


# Linear layers, residuals and streams of every type, thresholds of several consumers.
@pytest.mark.slow
@TARGET
@pytest.mark.parametrize(
    "case", ["chain", "preact_residual_bfloat16", "preact_residual_float16", "depthwise", "many_consumers", "one_pixel"]
)
def test_every_layer_of_a_program_compiles(case: str, target: str, tmp_path: Path) -> None:
    program, blob = programs.CASES[case](0)
    assert check_layers(program, blob, target, tmp_path) >= 1


@pytest.mark.gpu
@pytest.mark.parametrize(("w_bits", "a_bits", "groups"), [(4, 4, 1), (8, 8, 1), (2, 8, 64)])
def test_codes_differ_by_one_at_most_on_a_gpu(w_bits: int, a_bits: int, groups: int) -> None:
    program, blob = programs.one_conv(
        0, channels=64, filters=64, size=(15, 14), w_bits=w_bits, a_bits=a_bits, groups=groups
    )
    images = programs.random_inputs(program, 8, 1)
    expected: dict[int, torch.Tensor] = {}
    ReferenceRunner(program, blob).run(images, expected)
    actual: dict[int, torch.Tensor] = {}
    runner = GpuRunner(program, blob, "cuda", {"step1": HalfConfig()})
    runner.run([image.cuda() for image in images], actual)
    step = next(step for step in program.steps if isinstance(step, ConvStep))
    target = step.emit.consumers[0].tensor
    difference = (actual[target].cpu().int() - expected[target].int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.05
