"""A stem and the maximum behind it in one kernel, interpreted: every number is that of the two steps.

Started by tests/kernels/test_gpu_stem_pool.py; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/check_stem_pool.py
"""

from __future__ import annotations

from types import ModuleType

import programs
import pytest
import torch
from contenders import assert_same, assert_traced
from gpu_model import launches_on_the_model
from s8_cases import as_nibbles
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.cuda import S8Config
from lbs_kernels.gpu.configs.stem_pool import StemPoolConfig
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.gpu.stem import fold_stem
from lbs_kernels.gpu.stem_pool import PooledStem, pool_stems
from lbs_kernels.program.steps import Program
from lbs_kernels.run.reference import ReferenceRunner


def fused(program: Program, blob: Tensor) -> tuple[Program, Tensor]:
    folded, data = fold_stem(program, blob)
    one = pool_stems(folded, data)
    assert [step for step in one.steps if isinstance(step, PooledStem)]
    return one, data


def check(program: Program, blob: Tensor, config: StemPoolConfig | None = None, batch: int = 2) -> None:
    images = programs.random_inputs(program, batch, 4)
    expected: dict[int, Tensor] = {}
    outputs = ReferenceRunner(program, blob).run(images, expected)
    # Whatever the test is of, the maxima are of many numbers.
    (pool,) = (step for step in program.steps if step.op == "pool")
    assert len(expected[pool.input].unique()) > min(10, 2 ** pool.emit.consumers[0].bits // 2)
    runner = GpuRunner(*fused(program, blob), "cpu", None if config is None else {"step1": config}, whole=False)
    for result, output in zip(runner.run(images), outputs, strict=True):
        assert_same(result, output, "output")


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("written", ["stream", "codes", "clamped"])
def test_every_way_between_the_two(written: str, stream_dtype: str, signs: bool) -> None:
    check(*programs.stem_and_maximum(3, written, stream_dtype=stream_dtype, signs=signs))


@pytest.mark.parametrize(("written", "bits"), [("stream", 4), ("stream", 2), ("codes", 4), ("codes", 2)])
def test_narrow_codes(written: str, bits: int) -> None:
    check(*programs.stem_and_maximum(5, written, bits=bits, filters=33, high=None if written == "codes" else 1.1))


@pytest.mark.parametrize("w_bits", [3, 4, 7])
def test_narrow_weights(w_bits: int) -> None:
    check(*programs.stem_and_maximum(6, w_bits=w_bits))


def test_nibbles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the one step and read by csrc/s8, on a model of the GPU."""
    launched = launches_on_the_model(monkeypatch)
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    program, blob = programs.stem_and_maximum(5, "codes", bits=4, filters=33)
    one, data = fused(program, blob)
    one, images = as_nibbles(one), programs.random_inputs(program, 2, 4)
    assert one.tensors[one.steps[-1].input].nibbles
    runner = GpuRunner(one, data, "cpu", {one.steps[-1].name: S8Config(*S8Config.tiles[-1])}, whole=False)
    (expected,) = ReferenceRunner(program, blob).run(images)
    assert_same(runner.run(images)[0], expected, "output")
    assert len(launched) == 1


# One pixel of the maximum; odd and even maps, whose last window lies inside or reaches out; several tiles of columns.
@pytest.mark.parametrize("size", [(2, 2), (5, 7), (16, 16), (30, 34), (8, 70)])
def test_sizes(size: tuple[int, int]) -> None:
    check(*programs.stem_and_maximum(7, size=size))


@pytest.mark.parametrize(
    "config",
    [
        StemPoolConfig(16, 16, 1, 4, 2),
        StemPoolConfig(16, 32, 2, 4, 3, 16),
        StemPoolConfig(32, 32, 3, 4, 3),
        StemPoolConfig(64, 64, 8, 4, 3),
        StemPoolConfig(128, 64, 5, 8, 2, 16),
    ],
    ids=str,
)
def test_configurations(config: StemPoolConfig) -> None:
    filters = 13 if config.block_o < 32 else 40
    check(*programs.stem_and_maximum(9, size=(30, 26), filters=filters), config, batch=3)


def test_the_trace_of_a_fused_program_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between the two is told as well, and every step of the program has its kernel."""
    program, blob = programs.stem_and_maximum(11)
    monkeypatch.setattr(kernels, "program_on", lambda program, blob, *_: fused(program, blob))
    runner = GpuRunner(program, blob, "cpu")
    assert_traced(runner, program, blob)
    names = [kernel.name for kernel in runner.kernels(2)]
    assert len(names) == len(program.steps)
    assert names[1] == names[2]
    assert names[1].startswith("triton:stempool_")


def test_a_sum_of_every_sign_wins_by_its_order() -> None:
    """Filters whose multiplier is 0 or negative, and biases that leave nothing but 0."""
    program, blob = programs.stem_and_maximum(13, filters=16)
    (conv,) = (step for step in program.steps if step.op == "bitconv2d")
    spec = program.arrays[conv.multiplier]
    blob = blob.clone()
    values = blob[spec.offset : spec.offset + spec.nbytes].view(torch.float32)
    values[0], values[1], values[2] = 0.0, -values[1].abs(), -0.0
    check(program, blob)
