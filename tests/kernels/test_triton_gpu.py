"""The Triton back end on a GPU against the reference, every element; run with -m gpu on a machine that has one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import one_step
import programs
import pytest
import torch
from contenders import assert_same
from torch import Tensor

from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.gemm import gemm_candidates
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program
from lbs_kernels.run.reference import ReferenceRunner

if TYPE_CHECKING:
    from lbs_kernels.gpu.runner import GpuRunner

pytestmark = pytest.mark.gpu
BITS = (2, 4, 8)
# Of a hundred configurations: they take a compiler minutes, and all of a test are compiled by one process.
PARTS = 10


def runner_and_images(program: Program, blob: Tensor, batch: int, seed: int) -> tuple[GpuRunner, list[Tensor]]:
    from lbs_kernels.gpu.runner import GpuRunner  # here, so that collecting needs no Triton

    images = [image.cuda() for image in programs.random_inputs(program, batch, seed)]
    return GpuRunner(program, blob, "cuda"), images


def check(program: Program, blob: Tensor, batch: int, seed: int) -> None:
    """Trace and outputs equal the reference, from buffers full of garbage."""
    runner, images = runner_and_images(program, blob, batch, seed)
    expected: dict[int, Tensor] = {}
    outputs = ReferenceRunner(program, blob).run([image.cpu() for image in images], expected)
    runner.plan(batch).arena.random_()
    actual: dict[int, Tensor] = {}
    results = runner.run(images, actual)
    for index in set(expected) - set(program.inputs):
        assert_same(actual[index], expected[index], f"tensor {index} ({program.tensors[index].name})")
    for result, output in zip(results, outputs, strict=True):
        assert_same(result, output, "output")


@pytest.mark.parametrize("name", sorted(programs.CASES))
@pytest.mark.parametrize("batch", [1, 5])
def test_named_programs(name: str, batch: int) -> None:
    check(*programs.CASES[name](seed=7), batch=batch, seed=batch)


@pytest.mark.parametrize("seed", range(200, 216))
def test_random_programs(seed: int) -> None:
    check(*programs.random_program(seed), batch=1 + seed % 4, seed=seed)


@pytest.mark.parametrize("w_bits", BITS)
@pytest.mark.parametrize("a_bits", BITS)
def test_every_pair_of_bits_at_network_size(w_bits: int, a_bits: int) -> None:
    program, blob = programs.one_conv(
        0, channels=128, filters=100, size=(28, 28), w_bits=w_bits, a_bits=a_bits, out_bits=a_bits, stride=(2, 2)
    )
    check(program, blob, batch=4, seed=w_bits)


# Every third of the configurations that differ in their tile, so that the layout conversions the compiler picks are
# compared. Of 96 channels a step takes one tap, of 40 and 20 several.
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("channels", [96, 40, 20])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (8, 8)])
def test_accumulator_of_every_tile(w_bits: int, a_bits: int, channels: int, part: int) -> None:
    from lbs_kernels.gpu.runner import GpuRunner

    generator = torch.Generator().manual_seed(w_bits)
    x = torch.randint(0, 1 << a_bits, (2, 17, 15, channels), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 1 << w_bits, (130, 3, 3, channels), generator=generator, dtype=torch.uint8)
    planes = pack_weights(codes, w_bits)
    step = one_step.conv(x, planes, a_bits=a_bits, kernel=(3, 3), stride=(2, 1), padding=(1, 1))
    (expected,) = ReferenceRunner(step.program, step.blob).run([step.image])
    image = step.image.cuda()
    problem = Problem("bitconv2d", 2, 17, 15, channels, 130, (3, 3), (2, 1), (1, 1), w_bits=w_bits, a_bits=a_bits)
    chosen = {
        (c.block_m, c.block_o, c.block_words, c.block_taps, c.warps, c.weights_first, c.weights, c.split_k > 1): c
        for c in gemm_candidates(problem)
    }
    for config in list(chosen.values())[3 * part :: 3 * PARTS]:
        (actual,) = GpuRunner(step.program, step.blob, "cuda", {one_step.STEP: config}).run([image])
        assert_same(actual, expected, f"accumulator of {config}")


# A window of 5 x 5 takes the compiler seconds; three parts are a spread of all.
@pytest.mark.parametrize("part", [*range(3), *(pytest.param(part, marks=pytest.mark.slow) for part in range(3, PARTS))])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (4, 4), (8, 8), (8, 2)])
def test_depthwise_of_every_configuration(w_bits: int, a_bits: int, size: int, part: int) -> None:
    from lbs_kernels.gpu.runner import GpuRunner

    program, blob = programs.one_conv(
        0, channels=100, filters=100, groups=100, size=(15, 14), w_bits=w_bits, a_bits=a_bits, out_bits=4,
        kernel=(size, size), padding=(size // 2, size // 2), stride=(2, 1),
    )  # fmt: skip
    images = programs.random_inputs(program, 3, 0)
    expected = ReferenceRunner(program, blob).run(images)[0]
    runner = GpuRunner(program, blob, "cuda")
    problem = runner.problems(3)["step1"]
    direct = [choice.config for choice in kernels.candidates(problem) if choice.kernel.family == "triton"]
    for config in direct[part::PARTS]:
        other = GpuRunner(program, blob, "cuda", {"step1": config})
        assert_same(other.run([images[0].cuda()])[0], expected, str(config))


def test_parts_of_a_reduction_meet_again_and_again() -> None:
    """Many launches on one workspace: a counter or a sum left behind would show in the next."""
    program, blob = programs.one_conv(0, channels=512, filters=500, size=(7, 7), w_bits=4, a_bits=4)
    runner, images = runner_and_images(program, blob, 1, 0)
    expected = ReferenceRunner(program, blob).run([images[0].cpu()])[0]
    for _ in range(200):
        assert_same(runner.run(images)[0], expected, "output")


def test_not_a_number_and_infinity_become_codes() -> None:
    program, blob = programs.one_conv(0, channels=3, filters=4, size=(3, 3), w_bits=4, a_bits=8, zero=100)
    runner, images = runner_and_images(program, blob, 1, 0)
    images[0][0, :, 1, 1] = torch.tensor([math.nan, math.inf, -math.inf], device="cuda")
    output = ReferenceRunner(program, blob).run([images[0].cpu()])[0]
    assert_same(runner.run(images)[0], output, "output")


def test_graph_replay_equals_the_call() -> None:
    program, blob = programs.preact_residual(0)
    runner, static = runner_and_images(program, blob, 3, 0)
    out = runner.run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.run(static, out=out)
    for seed in (1, 2):
        fresh = [image.cuda() for image in programs.random_inputs(program, 3, seed)]
        for target, image in zip(static, fresh, strict=True):
            target.copy_(image)
        graph.replay()
        expected = ReferenceRunner(program, blob).run([image.cpu() for image in fresh])
        for result, output in zip(out, expected, strict=True):
            assert_same(result, output, "replayed output")


def test_steady_state_neither_allocates_nor_waits() -> None:
    program, blob = programs.imagenet_stem(0)
    runner, images = runner_and_images(program, blob, 2, 0)
    out = runner.run(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.run(images, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
