"""The s8 kernels on a GPU against the reference, every element; run with -m gpu on a machine that has one."""

from __future__ import annotations

import one_step
import programs
import pytest
import torch
from cuda_steps import check_steps
from s8_cases import READINGS, SHAPES, layer, random_codes

from lbs_kernels import extension
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.cuda import S8Config, machines
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Emit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}"),
]
CONFIGS = [S8Config(*tile) for tile in S8Config.tiles]


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


@pytest.mark.parametrize("reading", sorted(READINGS))
def test_weights_and_zero_points(reading: str) -> None:
    made = layer("pixel", reading, batch=70)
    assert check_steps(made.program, made.blob, [made.image], "cuda", CONFIGS[0]) == [one_step.STEP]


@pytest.mark.parametrize("rows", [1, 63, 64, 1000])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_linear(config: S8Config, rows: int) -> None:
    x, planes = random_codes(rows, (rows, 512), 1000, (1, 1), 8)
    made = one_step.linear(x, planes, a_bits=8, grid="zero", zero=9)
    assert check_steps(made.program, made.blob, [made.image], "cuda", config) == [one_step.STEP]


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
    for config in CONFIGS:
        used = S8Config(*config.row[:1], config.block_m, config.block_o, config.stages, thresholds)
        assert check_steps(program, blob, programs.random_inputs(program, 4, 1), "cuda", used) == ["step1", "step2"]


@pytest.mark.parametrize("name", sorted(programs.CASES))
def test_named_programs(name: str) -> None:
    program, blob = programs.CASES[name](seed=5)
    images = programs.random_inputs(program, batch=5, seed=3)
    for config in CONFIGS:
        check_steps(program, blob, images, "cuda", config)


@pytest.mark.parametrize("seed", range(500, 524))
def test_random_programs(seed: int) -> None:
    program, blob = programs.random_program(seed)
    check_steps(program, blob, programs.random_inputs(program, 1 + seed % 4, seed), "cuda", kind=S8Config)


def test_the_default_runs_a_layer_of_a_network() -> None:
    problem = Problem("bitconv2d", 32, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), w_bits=8, a_bits=8, device="cuda")
    choice = kernels.default(problem)
    assert isinstance(choice.config, S8Config)
    program, blob = layer_program(problem)
    image = torch.rand(problem.batch, problem.in_channels, problem.height, problem.width)
    assert check_steps(program, blob, [image], "cuda", choice.config) == [LAYER]


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
