"""The s8 kernels on a GPU against the reference, every element; run with -m gpu on a machine that has one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import one_step
import programs
import pytest
import torch
from contenders import assert_same
from cuda_steps import check_replays, check_steps, served
from s8_cases import READINGS, SHAPES, all_as_bytes, coded_residuals, deep, layer, random_codes, residuals, shortcuts

from lbs_kernels import extension
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.cuda import S8Config, machines
from lbs_kernels.gpu.forms import as_kept
from lbs_kernels.gpu.stem import FoldedStep
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import STREAM_DTYPES, Emit, Program
from lbs_kernels.run.reference import ReferenceRunner

gpu_runner = pytest.importorskip("lbs_kernels.gpu.runner", reason="Triton is not installed: pip install triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}"),
]
CONFIGS = [S8Config(*tile) for tile in S8Config.tiles]
SHARED = S8Config(*S8Config.clusters[0])
WRITES_PLANES = [config for config in CONFIGS if config.writes("planes")]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if "wgmma" not in machines("cuda"):
        pytest.skip("this GPU has no wgmma")


# Batches of one wave and of several, so that every block works off many tiles.
@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("reading", ["w8_zero", "w4_odd"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_accumulator(config: S8Config, reading: str, name: str, batch: int) -> None:
    made = layer(name, reading, seed=batch, batch=batch)
    for _ in range(3):  # a race need not show at once
        assert check_steps(made.program, made.blob, [made.image], "cuda", config) == [one_step.STEP]


# 22 chunks, more than any ring has; three tiles of 128 pixels and more for a block.
@pytest.mark.parametrize("channels", [304, 80, 160])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tiles_of_more_chunks_than_the_ring_follow_one_another(config: S8Config, channels: int) -> None:
    x, planes = random_codes(channels, (200, 14, 14, channels), 24, (3, 3), 4)
    made = one_step.conv(x, planes, a_bits=8, kernel=(3, 3), padding=(1, 1), zero=77)
    for _ in range(3):
        assert check_steps(made.program, made.blob, [made.image], "cuda", config) == [one_step.STEP]


@pytest.mark.parametrize("reading", sorted(READINGS))
def test_weights_and_zero_points(reading: str) -> None:
    made = layer("pixel", reading, batch=70)
    assert check_steps(made.program, made.blob, [made.image], "cuda", CONFIGS[0]) == [one_step.STEP]


# Chunks of the reduction: 7, 7, 5 and 22.
@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize(
    ("name", "split"), [("odd", 2), ("odd", 4), ("stem", 4), ("outside", 4), ("long", 2), ("long", 4), ("long", 8)]
)
@pytest.mark.parametrize("reading", ["w8_odd", "w8_zero", "w4_odd"])
def test_blocks_of_a_cluster_share_a_reduction(reading: str, name: str, split: int, batch: int) -> None:
    made = layer(name, reading, seed=batch, batch=batch)
    for _ in range(3):
        found = check_steps(made.program, made.blob, [made.image], "cuda", replace(SHARED, split=split))
        assert found == [one_step.STEP]


@pytest.mark.parametrize("filters", [130, 72, 33])
def test_shared_tiles_are_written_as_others(filters: int) -> None:
    for program, blob in (residuals(filters, "float16"), coded_residuals(filters)):
        images = programs.random_inputs(program, 70, 1)
        assert check_steps(program, blob, images, "cuda", replace(SHARED, split=4)) == ["step1", "step2"]


@pytest.mark.parametrize("rows", [1, 63, 64, 1000])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_linear(config: S8Config, rows: int) -> None:
    x, planes = random_codes(rows, (rows, 512), 1000, (1, 1), 8)
    made = one_step.linear(x, planes, a_bits=8, grid="zero", zero=9)
    assert check_steps(made.program, made.blob, [made.image], "cuda", config) == [one_step.STEP]


@pytest.mark.parametrize("filters", [130, 72, 68, 33, 13])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_residuals_and_several_consumers(config: S8Config, filters: int) -> None:
    for program, blob in (*(residuals(filters, dtype) for dtype in STREAM_DTYPES), coded_residuals(filters)):
        program = program if config.writes("planes") else all_as_bytes(program)
        images = programs.random_inputs(program, 70, 1)
        assert check_steps(program, blob, images, "cuda", config) == ["step1", "step2"]


@pytest.mark.parametrize("thresholds", [0, 4])
@pytest.mark.parametrize("out_bits", [1, 2, 4])
def test_codes_alone_by_thresholds_and_by_floats(out_bits: int, thresholds: int) -> None:
    b = programs.Builder(out_bits)
    image = b.image(128, 14, 14)
    codes = b.consumer((14, 14, 128), 8)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, 200)
    b.conv(codes.tensor, Emit(low=0.0, consumers=(b.consumer(shape, out_bits),)), 200, w_bits=4)
    b.conv(codes.tensor, Emit(stream=b.stream(shape, output=True)), 200, w_bits=2)
    program, blob = b.build()
    for config in WRITES_PLANES:
        used = S8Config(*config.row[:1], config.block_m, config.block_o, config.stages, thresholds)
        assert check_steps(program, blob, programs.random_inputs(program, 4, 1), "cuda", used) == ["step1", "step2"]


@pytest.mark.parametrize("name", sorted(programs.CASES))
def test_named_programs(name: str) -> None:
    program, blob = programs.CASES[name](seed=5)
    images = programs.random_inputs(program, batch=5, seed=3)
    for config in WRITES_PLANES:
        check_steps(program, blob, images, "cuda", config)


@pytest.mark.parametrize("seed", range(500, 524))
def test_random_programs(seed: int) -> None:
    program, blob = programs.random_program(seed)
    check_steps(program, blob, programs.random_inputs(program, 1 + seed % 4, seed), "cuda", kind=S8Config)


def test_the_default_runs_a_layer_of_a_network() -> None:
    problem = Problem("bitconv2d", 128, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), w_bits=8, a_bits=8, device="cuda")
    choice = kernels.default(problem)
    assert isinstance(choice.config, S8Config)
    program, blob = layer_program(problem)
    image = torch.rand(problem.batch, problem.in_channels, problem.height, problem.width)
    assert check_steps(program, blob, [image], "cuda", choice.config) == [LAYER]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_folded_stem(dtype: str) -> None:
    program, blob = programs.stem(0, dtype, kernel=(7, 7), padding=(3, 3), size=(64, 48))
    runner = gpu_runner.GpuRunner(program, blob, "cuda")
    assert any(isinstance(step, FoldedStep) for step in runner.program.steps)
    check_runner(runner, program, blob)


@pytest.mark.parametrize("name", ["chain", "preact_residual", "weights_with_a_zero", "depthwise"])
def test_narrow_codes_kept_as_bytes(name: str) -> None:
    program, blob = programs.CASES[name](seed=2)
    kept = as_kept(program, lambda problem: 1e-5 / problem.a_bits)
    assert kept != program
    served_by_s8 = {step.name: CONFIGS[-1] for step in kept.steps if served(kept, step, 4, "cuda", S8Config)}
    check_runner(gpu_runner.GpuRunner(kept, blob, "cuda", served_by_s8), program, blob)


@pytest.mark.parametrize("kernels_of", ["s8", "shared", "triton", "all"])
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("pdl", ["0", "1"])
def test_kernels_that_overlap(pdl: str, batch: int, kernels_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep network whose memory is written again two steps later, called and replayed without a pause."""
    monkeypatch.setenv("LBS_PDL", pdl)
    program, blob = deep(12)
    names = [step.name for step in program.steps[1:]]
    s8, shared = dict.fromkeys(names, CONFIGS[0]), dict.fromkeys(names, replace(SHARED, split=4))
    mine = {"s8": s8, "shared": shared, "triton": {}, "all": dict([*s8.items()][::3] + [*shared.items()][1::3])}
    check_replays(gpu_runner.GpuRunner(program, blob, "cuda", mine[kernels_of], ("triton",)), program, blob, batch)


@pytest.mark.parametrize("fork", ["0", "1"])
@pytest.mark.parametrize("between", [1, 2])
def test_shortcuts_on_a_stream_of_their_own(between: int, fork: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBS_FORK", fork)
    program, blob = shortcuts(3, between=between)
    runner = gpu_runner.GpuRunner(program, blob, "cuda")
    assert bool(runner.plan(1).beside) == (fork == "1")
    check_replays(runner, program, blob, 1)


def check_runner(runner: Any, program: Program, blob: torch.Tensor) -> None:
    """Every tensor equals the reference's of the program as it was."""
    images = [x.cuda() for x in programs.random_inputs(program, 4, 4)]
    expected: dict[int, torch.Tensor] = {}
    actual: dict[int, torch.Tensor] = {}
    ReferenceRunner(program, blob.cuda()).run(images, expected)
    runner.run(images, actual)
    for index in expected:
        assert_same(actual[index], expected[index], f"tensor {index}")


def test_the_roof_multiplies() -> None:
    native = extension.require_cuda()
    out = torch.zeros(native.s8_peak_threads(0), dtype=torch.int32, device="cuda:0")
    sums = []
    for repeats in (1, 2):
        count = native.s8_peak(repeats, out.data_ptr(), 0, torch.cuda.current_stream(0).cuda_stream)
        blocks = torch.cuda.get_device_properties(0).multi_processor_count
        assert count == blocks * repeats * 2 * 128 * 128 * 128
        sums.append(out.cpu().clone())
    assert bool((sums[0] != 0).any())
    assert torch.equal(2 * sums[0], sums[1])
