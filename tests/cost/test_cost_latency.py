"""The grid of problems that latency tables hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import lbs.cost
import lbs.models
from lbs.cost.latency import latency_grid, timed
from lbs.search.quantities import seconds
from lbs_kernels.errors import PlanError, ShapeError
from lbs_kernels.program.layer import layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table
from lbs_kernels.times.table import TuningTable


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(table, "device_slug", table.kind)
    table.forget()
    yield
    table.forget()


def layers(name: str) -> lbs.cost.NetworkLayers:
    return lbs.cost.network_layers(lbs.models.create(name), lbs.models.example(name))


def test_whole_layers_come_first_and_ends_keep_their_shape() -> None:
    net = layers("cifar_resnet20")
    grid = latency_grid(net, [(4, 4), (2, 2)], points=2, group=8)
    assert len(set(grid)) == len(grid)
    whole = {layer.problem for bits in ((4, 4), (2, 2)) for layer in net.with_bits(*bits).layers}
    assert set(grid[: len(whole)]) == whole
    stem = [problem for problem in grid if problem.in_channels == 3]
    assert {problem.out_channels for problem in stem} == {8, 16}
    linear = [problem for problem in grid if problem.op == "bitlinear"]
    assert {(problem.in_channels, problem.out_channels) for problem in linear} == {(32, 100), (64, 100)}
    assert all((problem.w_bits, problem.a_bits) == (8, 8) for problem in [*stem, *linear])
    assert all(problem.out_channels % 8 == 0 for problem in grid if problem.op == "bitconv2d")


def test_depthwise_layers_keep_one_filter_per_channel() -> None:
    grid = latency_grid(layers("mobilenet_v2"), [(4, 4)], points=2)
    depthwise = [problem for problem in grid if problem.groups > 1]
    assert depthwise
    assert all(problem.groups == problem.in_channels == problem.out_channels for problem in depthwise)


def test_batches_and_what_makes_no_sense() -> None:
    net = layers("cifar_resnet20")
    assert {problem.batch for problem in latency_grid(net, [(4, 4)], batch=8, points=1)} == {8}
    with pytest.raises(PlanError, match="points 0"):
        latency_grid(net, [(4, 4)], points=0)


def test_the_grid_makes_every_kept_size_of_the_network_known() -> None:
    net = layers("cifar_resnet20")
    grid = latency_grid(net, [(4, 4)], points=2, group=8)
    # Times proportional to the work are met exactly at the grid's points, and whole networks add up.
    rows = {table.key(problem): {"cpu:t1": problem.macs * 1e-12} for problem in grid}
    table.write(table.user_path("cpu"), TuningTable("cpu", rows))
    whole = [layer.problem for layer in net.with_bits(4, 4).layers]
    found = [table.estimate(problem, threads=1) for problem in whole]
    assert found == pytest.approx([problem.macs * 1e-12 for problem in whole])
    assert table.estimate(whole[1], threads=2) is None
    assert None in [table.estimate(layer.problem) for layer in net.with_bits(2, 2).layers]


@pytest.mark.parametrize(("kernel", "filters", "taps"), [(4, [32], [4]), (3, [8] * 4, [4, 2, 2, 1])])
def test_a_transposed_convolution_is_timed_as_its_steps(kernel: int, filters: list[int], taps: list[int]) -> None:
    layer = Problem("conv_transpose2d", 1, 8, 8, 16, 8, (kernel, kernel), (2, 2), (1, 1))
    steps = timed(layer)
    assert [step.out_channels for step in steps] == filters
    assert [step.window.taps for step in steps] == taps
    assert {step.op for step in steps} == {"bitconv2d"}
    assert seconds(lambda problem: float(problem.window.taps)).price(layer) == sum(taps)
    for step in steps:
        layer_program(step)
    with pytest.raises(ShapeError, match="is no step; time the convolutions"):
        layer_program(layer)
