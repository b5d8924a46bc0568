"""The grid of problems that latency tables hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import lbs.cost
import lbs.models
from lbs.cost import latency
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


def test_calls_at_uniform_bits_are_met_and_mixed_bits_lie_between() -> None:
    """Layers take what their products do; what surrounds them takes 30 us at 8 bits, 50 at 4."""
    net = [layer.problem for layer in layers("cifar_resnet20").layers]
    rests = {8: 30e-6, 4: 50e-6}
    uniform = {bits: latency.at_uniform_bits(net, bits, bits) for bits in rests}
    mixed = [*uniform[4][:10], *uniform[8][10:]]
    crossed = latency.at_uniform_bits(net, 8, 4)
    rows = {
        table.key(step): {"cpu:t1": step.macs * 1e-12}
        for problem in (*uniform[8], *uniform[4], *crossed)
        for step in timed(problem)
    }
    layer_sum = sum(problem.macs * 1e-12 for problem in net)
    calls = {latency.call_key(net, 1, bits, bits): {"cpu:t1": rest + layer_sum} for bits, rest in rests.items()}
    table.write(table.user_path("cpu"), TuningTable("cpu", rows, calls=calls))

    def call(kept: list[Problem], threads: int = 1) -> float | None:
        return latency.call_seconds(net, kept, batch=1, threads=threads)

    for bits, rest in rests.items():
        assert call(uniform[bits]) == pytest.approx(layer_sum + rest)
        look_up, constant = latency.Tuned().of_network(net)
        assert constant + sum(map(look_up, uniform[bits])) == pytest.approx(call(uniform[bits]))
    inner = len(net) - 2
    assert call(mixed) == pytest.approx(layer_sum + 30e-6 + 20e-6 * 9 / inner)
    assert call(crossed) == pytest.approx(layer_sum + 40e-6)
    assert call(uniform[8], threads=2) is None
    with pytest.raises(PlanError, match="no call of this network with 2 threads is known"):
        latency.Tuned(threads=2).of_network(net)


def test_what_surrounds_a_transposed_convolution_counts_once() -> None:
    """A 3 x 3 one of stride 2 is four steps: at uniform bits they add up to what was measured, layer by layer too."""
    up = Problem("conv_transpose2d", 1, 8, 8, 16, 16, (3, 3), (2, 2), (1, 1))
    conv = Problem("bitconv2d", 1, 8, 8, 16, 16, (3, 3), (1, 1), (1, 1))
    net = [conv, up, conv, conv]
    uniform = {bits: latency.at_uniform_bits(net, bits, bits) for bits in (4, 8)}
    rows = {table.key(step): {"cpu:t1": 1e-6} for found in uniform.values() for layer in found for step in timed(layer)}
    calls = {latency.call_key(net, 1, bits, bits): {"cpu:t1": 7e-6 + rest} for bits, rest in ((8, 30e-6), (4, 50e-6))}
    table.write(table.user_path("cpu"), TuningTable("cpu", rows, calls=calls))
    for bits, rest in ((8, 30e-6), (4, 50e-6)):
        look_up, constant = latency.Tuned().of_network(net)
        assert latency.call_seconds(net, uniform[bits], batch=1, threads=1) == pytest.approx(7e-6 + rest)
        assert constant + sum(look_up(step) for layer in uniform[bits] for step in timed(layer)) == pytest.approx(
            7e-6 + rest
        )
