"""Tuning: what is measured, kept, resumed and refused, with fake times; and two real problems on this processor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lbs_kernels import extension
from lbs_kernels.program.layer import layer_program, result_of
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times import table as tuning_table
from lbs_kernels.times.table import TuningTable, bucket, estimate, key
from lbs_kernels.tune import tuner
from lbs_kernels.tune.tuner import Measured

CONV = Problem("bitconv2d", 2, 8, 8, 16, 20, (3, 3), (2, 2), (1, 1), w_bits=4, a_bits=2)
PROBLEMS = [replace(CONV, batch=batch) for batch in (1, 16, 128)]
native = pytest.mark.skipif(extension.cpu is None, reason=f"native module: {extension.cpu_reason}")


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tuning_table, "device_slug", tuning_table.kind)
    tuning_table.forget()
    yield
    tuning_table.forget()


def tune(problems: list[Problem], seconds: float = 1e-3, **options: Any) -> tuple[tuner.Tuning, list[Problem]]:
    asked: list[Problem] = []

    def measure(problem: Problem) -> Measured:
        asked.append(problem)
        return Measured(problem, {"cpu:t1": seconds})

    return tuner.tune(problems, measure, tuner.known_on_cpu(1), device="cpu", **options), asked


def table() -> TuningTable:
    return tuning_table.read(tuning_table.user_path("cpu"))


def test_each_bucket_is_measured_once_and_kept() -> None:
    done, asked = tune([*PROBLEMS, PROBLEMS[0], replace(CONV, batch=120)])
    assert asked == PROBLEMS
    assert (done.measured, done.skipped, done.left) == (3, 0, 0)
    assert table().rows == {key(problem): {"cpu:t1": 1e-3} for problem in PROBLEMS}


def test_what_is_known_is_not_measured_again_unless_asked() -> None:
    tune(PROBLEMS[:1])
    done, asked = tune(PROBLEMS, seconds=2e-3)
    assert asked == PROBLEMS[1:]
    assert (done.measured, done.skipped) == (2, 1)
    assert table().rows[key(PROBLEMS[0])] == {"cpu:t1": 1e-3}
    _, asked = tune(PROBLEMS, seconds=3e-3, again=True)
    assert asked == PROBLEMS
    assert table().rows[key(PROBLEMS[0])] == {"cpu:t1": 3e-3}


def test_times_of_other_threads_are_kept_apart() -> None:
    tune(PROBLEMS[:1])
    measure = lambda problem: Measured(problem, {"cpu:t2": 5e-4})  # noqa: E731
    done = tuner.tune(PROBLEMS[:1], measure, tuner.known_on_cpu(2), device="cpu")
    assert done.measured == 1
    assert table().rows[key(PROBLEMS[0])] == {"cpu:t1": 1e-3, "cpu:t2": 5e-4}
    assert estimate(PROBLEMS[0], threads=1) == 1e-3
    assert estimate(PROBLEMS[0]) == 5e-4


def test_every_problem_is_written_before_the_next_and_the_time_ends_it() -> None:
    seen: list[int] = []
    ticks = iter([0.0, 10.0, 59.0, 61.0])
    measured: list[Measured | None] = []

    def measure(problem: Problem) -> Measured:
        seen.append(len(table().rows) if tuning_table.user_path("cpu").exists() else 0)
        return Measured(problem, {"cpu:t1": 1.0})

    done = tuner.tune(
        PROBLEMS, measure, tuner.known_on_cpu(1), device="cpu", seconds=60, progress=measured.append,
        clock=lambda: next(ticks),
    )  # fmt: skip
    assert seen == [0, 1]
    assert (done.measured, done.left) == (2, 1)
    assert [one.problem for one in measured if one is not None] == PROBLEMS[:2]


def test_an_interrupted_run_keeps_what_it_measured() -> None:
    def measure(problem: Problem) -> Measured:
        if problem.batch == 128:
            raise KeyboardInterrupt
        return Measured(problem, {"cpu:t1": 1.0})

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(PROBLEMS, measure, tuner.known_on_cpu(1), device="cpu")
    assert len(table().rows) == 2
    assert tune(PROBLEMS)[1] == PROBLEMS[2:]


MEASURER = """
import sys, time
from dataclasses import replace
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table
from lbs_kernels.tune import tuner

first, gate = int(sys.argv[1]), sys.argv[2]
table.device_slug = table.kind

def measure(problem):
    open(f"{gate}.{first}", "w").close()
    while not all(map(table.Path.exists, (table.Path(f"{gate}.0"), table.Path(f"{gate}.1000")))):
        time.sleep(0.001)  # until both have read the table
    return tuner.Measured(problem, {"cpu:t1": 1e-3})

problems = [Problem("bitlinear", 1, 1, 1, first + place, 8) for place in range(1, 61)]
tuner.tune(problems, measure, tuner.known_on_cpu(1), device="cpu")
"""


def test_two_processes_that_measure_at_a_time_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURER]
    both = [subprocess.Popen([*command, str(first), str(tmp_path / "gate")]) for first in (0, 1000)]
    assert [process.wait(60) for process in both] == [0, 0]
    wanted = {key(Problem("bitlinear", 1, 1, 1, n, 8)) for first in (0, 1000) for n in range(first + 1, first + 61)}
    assert set(table().rows) == wanted


def test_what_another_process_measured_meanwhile_is_not_measured_again() -> None:
    def measure(problem: Problem) -> Measured:
        tuning_table.add(TuningTable("cpu", {key(PROBLEMS[1]): {"cpu:t1": 2e-3}}, calls={"net": {"cpu:t1": 1e-2}}))
        return Measured(problem, {"cpu:t1": 1e-3})

    done = tuner.tune(PROBLEMS, measure, tuner.known_on_cpu(1), device="cpu")
    assert (done.measured, done.skipped) == (2, 1)
    assert table().rows[key(PROBLEMS[1])] == {"cpu:t1": 2e-3}
    assert table().calls == {"net": {"cpu:t1": 1e-2}}


def test_a_refused_kernel_leaves_no_time() -> None:
    measure = lambda problem: Measured(problem, {}, {"cpu:t1": "9% differ from the reference"})  # noqa: E731
    done = tuner.tune(PROBLEMS[:1], measure, tuner.known_on_cpu(1), device="cpu")
    assert done.refused == {key(PROBLEMS[0]): {"cpu:t1": "9% differ from the reference"}}
    assert not tuning_table.user_path("cpu").exists()


LAYERS = [
    CONV,
    replace(CONV, in_channels=16, out_channels=16, groups=16, stride=(1, 1), w_bits=8, a_bits=8),
    Problem("bitlinear", 3, 1, 1, 64, 10, w_bits=8, a_bits=8),
    Problem("quantpack", 2, 5, 4, 3, 3, w_bits=0, a_bits=8),
    Problem("quantpack", 2, 5, 4, 3, 3, w_bits=0, a_bits=0),
    Problem("pool", 2, 7, 6, 5, 5, (3, 3), (2, 2), (1, 1), w_bits=0, a_bits=4),
    Problem("pool", 2, 7, 6, 5, 5, (3, 3), (2, 2), (1, 1), w_bits=0, a_bits=0),
    Problem("pool", 2, 7, 6, 5, 5, (7, 6), w_bits=0, a_bits=0),
    Problem("select", 2, 7, 6, 5, 5, w_bits=0, a_bits=4),
    Problem("select", 2, 7, 6, 5, 5, w_bits=0, a_bits=0),
    Problem("resize", 2, 7, 6, 5, 5, w_bits=0, a_bits=0),
]


@pytest.mark.parametrize("problem", LAYERS, ids=str)
def test_programs_pose_their_problem_and_are_mostly_unsaturated(problem: Problem) -> None:
    program, blob = layer_program(problem)
    step = next(step for step in program.steps if step.name == "layer")
    assert problem_of(step, program, problem.batch, problem.device) == problem
    trace: dict[int, torch.Tensor] = {}
    image = torch.rand(problem.batch, problem.in_channels, problem.height, problem.width)
    ReferenceRunner(program, blob).run([image], trace)
    result = trace[result_of(problem)]
    assert tuple(result.shape) == (problem.batch, problem.out_height, problem.out_width, problem.out_channels)
    spec = program.tensors[result_of(problem)]
    top = (1 << spec.bits) - 1 if spec.form == "codes" else float("inf")
    assert float(((result > 0) & (result < top)).float().mean()) > 0.3


@native
@pytest.mark.parametrize("problem", LAYERS, ids=str)
def test_the_native_step_is_checked_and_timed(problem: Problem) -> None:
    found = tuner.measure_cpu(problem, threads=1, rounds=2)
    assert not found.refused
    able, others = ({"cpu/direct:t1"}, {"cpu/lanes:t1"}) if problem.op == "bitconv2d" else ({"cpu:t1"}, set())
    assert able <= set(found.seconds) <= able | others
    assert all(0 < seconds < 1 for seconds in found.seconds.values())
    assert tuner.known_on_cpu(1)(problem, found.seconds)
    assert not tuner.known_on_cpu(2)(problem, found.seconds)


@native
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ReferenceRunner.run

    def wrong(self: ReferenceRunner, inputs: Any, trace: dict[int, torch.Tensor]) -> Any:
        outputs = honest(self, inputs, trace)
        trace[2] = trace[2] ^ 1
        return outputs

    monkeypatch.setattr(ReferenceRunner, "run", wrong)
    found = tuner.measure_cpu(CONV, threads=1, rounds=1)
    assert not found.seconds
    assert "100.00% of the elements differ from the reference" in found.refused["cpu/direct:t1"]


def write_grid(base: Problem, seconds: dict[tuple[int, int], float], groups: bool = False) -> None:
    rows = {}
    for (c, o), value in seconds.items():
        problem = replace(base, in_channels=c, out_channels=o, groups=c if groups else 1)
        rows[key(problem)] = {"cpu:t1": value}
    tuning_table.write(tuning_table.user_path("cpu"), TuningTable("cpu", rows))


def test_estimates_interpolate_between_the_four_neighbours() -> None:
    base = replace(CONV, batch=1)
    write_grid(base, {(8, 8): 1.0, (8, 16): 2.0, (16, 8): 3.0, (16, 16): 8.0})
    at = lambda c, o, **change: estimate(replace(base, in_channels=c, out_channels=o, **change))  # noqa: E731
    assert at(8, 16) == 2.0
    assert at(8, 12) == pytest.approx(1.5)
    assert at(8, 10) == pytest.approx(1.25)  # nearer to the smaller one
    assert at(14, 8) == pytest.approx(2.5)
    assert at(12, 16) == pytest.approx(5.0)
    assert at(12, 12) == pytest.approx(3.5)
    assert at(4, 2) == 1.0  # below the grid: its smallest size
    assert at(24, 8) is None  # beyond it
    assert at(8, 8, a_bits=8) is None
    assert at(8, 8, stride=(1, 1)) is None
    assert at(8, 8, batch=3) == pytest.approx(3.0)  # per image, from the nearest bucket
    assert at(8, 8, batch=64) is None


def test_estimates_need_every_corner() -> None:
    base = replace(CONV, batch=1)
    write_grid(base, {(8, 8): 1.0, (8, 16): 2.0, (16, 16): 8.0})
    assert estimate(replace(base, in_channels=12, out_channels=12)) is None
    assert estimate(replace(base, in_channels=12, out_channels=16)) == pytest.approx(5.0)


def test_layers_of_one_geometry_share_a_grid_with_holes() -> None:
    """8 -> 32 and 32 -> 8, each measured at sizes of its own: between their sizes lie those of the other."""
    base = replace(CONV, batch=1)
    wide = {(c, o): float(c + 10 * o) for c in (4, 8) for o in (16, 32)}
    narrow = {(c, o): float(c + 10 * o) for c in (12, 32) for o in (4, 8)}
    write_grid(base, wide | narrow)
    at = lambda c, o: estimate(replace(base, in_channels=c, out_channels=o))  # noqa: E731
    assert at(20, 6) == pytest.approx(20 + 60)
    assert at(6, 20) == pytest.approx(6 + 200)
    assert at(8, 32) == 8 + 320
    assert at(2, 24) == pytest.approx(4 + 240)  # the smallest size of its own layer
    assert at(20, 20) is None  # between the two, where neither was measured


def test_a_depthwise_layer_is_a_line() -> None:
    base = replace(CONV, batch=1)
    write_grid(base, {(8, 8): 1.0, (16, 16): 2.0}, groups=True)
    assert estimate(replace(base, in_channels=12, out_channels=12, groups=12)) == pytest.approx(1.5)
    assert estimate(replace(base, in_channels=12, out_channels=12)) is None


def test_buckets_are_the_nearest_powers_of_two() -> None:
    for exponent in range(12):
        size = 1 << exponent
        assert bucket(size) == size
        assert bucket(max(1, int(size * 1.3))) in (size, 2 * size)
    assert bucket(0) == 1
