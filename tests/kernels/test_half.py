"""The half-precision fallback: its kernels compile ahead of time, and on a GPU its codes differ by one at most.

What it computes is tested interpreted (interpreted/check_half.py).
"""

from __future__ import annotations

from pathlib import Path

import programs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS, compiling

from lbs_kernels import gpu_runner
from lbs_kernels.gpu_runner import GpuRunner
from lbs_kernels.half_config import HalfConfig
from lbs_kernels.program import ConvStep
from lbs_kernels.reference_runner import ReferenceRunner


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("a_bits", [4, 8])
def test_its_kernels_compile_without_spills(
    a_bits: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Yes:
        value = True

    monkeypatch.setattr(gpu_runner, "INTERPRETED", Yes)  # binds on CPU tensors; launches are compiled only
    program, blob = programs.one_conv(0, channels=40, filters=33, size=(6, 6), w_bits=4, a_bits=a_bits)
    launches = GpuRunner(program, blob, "cpu", {"step1": HalfConfig()}).plan(2).launches
    with compiling(target, tmp_path) as kernels:
        launches[1]([])
    assert [kernel.name for kernel in kernels] == ["decode_kernel", "finish_kernel"]
    assert all(kernel.spill_bytes == 0 for kernel in kernels)


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
