"""Nibbles on a GPU against the reference, every element; run with -m gpu on a machine that has one."""

from __future__ import annotations

from dataclasses import replace

import one_step
import programs
import pytest
import torch
from contenders import assert_same
from cuda_steps import check_replays, check_steps
from s8_cases import NIBBLES, SHAPES, as_nibbles, deep, layer, random_codes, residuals

from lbs_kernels import extension
from lbs_kernels.gpu.configs.cuda import S8Config, machines
from lbs_kernels.gpu.forms import as_kept
from lbs_kernels.program.steps import sources
from lbs_kernels.run.reference import ReferenceRunner

gpu_runner = pytest.importorskip("lbs_kernels.gpu.runner", reason="Triton is not installed: pip install triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}"),
]
CONFIGS = [S8Config(*tile) for tile in S8Config.tiles]
SHARED = S8Config(*S8Config.clusters[0])
WRITES_NIBBLES = [config for config in CONFIGS if config.writes("nibbles")]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if "wgmma" not in machines("cuda"):
        pytest.skip("this GPU has no wgmma")


# Batches of one wave and of several, so that every block works off many tiles.
@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("reading", ["w8a4_zero", "w4a4_odd"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_accumulator(config: S8Config, reading: str, name: str, batch: int) -> None:
    made = layer(name, reading, seed=batch, batch=batch)
    for _ in range(3):  # a race need not show at once
        assert check_steps(made.program, made.blob, [made.image], "cuda", config) == [one_step.STEP]


# Fewer channels than a step, a step and one more, an odd number of steps, chunks, and more chunks than any ring has.
@pytest.mark.parametrize("channels", [24, 33, 96, 160, 512, 2048])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pointwise(config: S8Config, channels: int) -> None:
    x, planes = random_codes(channels, (100, 14, 14, channels), 200, (1, 1), 4, 4)
    made = one_step.conv(x, planes, a_bits=4, kernel=(1, 1), zero=5)
    for _ in range(3):
        assert check_steps(as_nibbles(made.program), made.blob, [made.image], "cuda", config) == [one_step.STEP]


@pytest.mark.parametrize("reading", sorted(NIBBLES))
def test_weights_and_zero_points(reading: str) -> None:
    made = layer("pixel", reading, batch=70)
    assert check_steps(made.program, made.blob, [made.image], "cuda", CONFIGS[0]) == [one_step.STEP]


@pytest.mark.parametrize(("name", "split"), [("odd", 2), ("long", 2), ("long", 4), ("long", 8)])
def test_blocks_of_a_cluster_share_a_reduction(name: str, split: int) -> None:
    made = layer(name, "w8a4_zero", batch=70)
    for _ in range(3):
        found = check_steps(made.program, made.blob, [made.image], "cuda", replace(SHARED, split=split))
        assert found == [one_step.STEP]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("filters", [130, 72, 68, 33])
@pytest.mark.parametrize("config", WRITES_NIBBLES, ids=str)
def test_nibbles_are_written_beside_streams_and_other_codes(config: S8Config, filters: int, bits: int) -> None:
    program, blob = residuals(filters, "float16", bits)
    images = programs.random_inputs(program, 70, 1)
    assert check_steps(as_nibbles(program), blob, images, "cuda", config) == ["step1", "step2"]


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("pdl", ["0", "1"])
def test_kernels_that_overlap(pdl: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBS_PDL", pdl)
    program, blob = deep(12, bits=4)
    configs = {step.name: CONFIGS[0] for step in program.steps[1:]}
    check_replays(gpu_runner.GpuRunner(as_nibbles(program), blob, "cuda", configs), program, blob, batch)


@pytest.mark.parametrize(
    "name", ["weights_with_a_zero", "imagenet_stem", "many_consumers", "averaged", "selected_streams", "moved_streams"]
)
def test_nibbles_written_by_triton(name: str) -> None:
    program, blob = programs.CASES[name](seed=2)
    kept = as_kept(program, lambda problem: 1e-6 if problem.nibbles else 1e-5)
    readers = [step.name for step in kept.steps if any(kept.tensors[index].nibbles for index in sources(step))]
    assert readers
    runner = gpu_runner.GpuRunner(kept, blob, "cuda", dict.fromkeys(readers, CONFIGS[0]))
    images = [x.cuda() for x in programs.random_inputs(program, 4, 4)]
    expected: dict[int, torch.Tensor] = {}
    actual: dict[int, torch.Tensor] = {}
    ReferenceRunner(program, blob.cuda()).run(images, expected)
    runner.run(images, actual)
    for index in expected:
        assert_same(actual[index], expected[index], f"tensor {index}")
