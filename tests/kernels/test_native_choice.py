"""The algorithm of a convolution by measured times: which are timed, and that a runner takes the faster one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native_program import ISAS, check
from test_native_winograd import largest_that_fits, posed, transforms
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import FormatError
from lbs_kernels.program.layer import layer_program
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep
from lbs_kernels.run.compiled import CompiledProgram
from lbs_kernels.run.cpu import CpuRunner
from lbs_kernels.times import stopwatch, table
from lbs_kernels.times.stopwatch import Times
from lbs_kernels.times.table import TuningTable, estimate, key
from lbs_kernels.tune import tuner
from lbs_kernels.tune.roof import measure_roof

pytestmark = [
    pytest.mark.skipif(extension.cpu is None, reason=f"native module: {extension.cpu_reason}"),
    # Where products are made in tiles, the direct kernel serves alone.
    pytest.mark.skipif("amx" in ISAS, reason="this processor has AMX"),
]

CONV = Problem("bitconv2d", 1, 14, 14, 32, 32, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=4)


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(table, "device_slug", table.kind)
    table.forget()
    yield
    table.forget()


def keep(rows: Mapping[Problem, Mapping[str, float]]) -> None:
    made = TuningTable("cpu", {key(problem): dict(times) for problem, times in rows.items()})
    table.write(table.user_path("cpu"), made)


def times(direct: float, winograd: float, threads: int = 1) -> dict[str, float]:
    return {f"cpu/direct:t{threads}": direct, f"cpu/winograd:t{threads}": winograd}


def algorithm(runner: CpuRunner, batch: int = 1, threads: int = 1) -> str:
    return runner.kernels(batch, threads=threads)[1].name.split("/")[-1]


@pytest.mark.parametrize(("direct", "winograd"), [(1e-3, 2e-3), (2e-3, 1e-3)])
def test_the_faster_one_is_taken(direct: float, winograd: float) -> None:
    program, blob = layer_program(CONV)
    guessed = algorithm(CpuRunner(program, blob))
    keep({CONV: times(direct, winograd)})
    expected = "direct" if direct < winograd else "winograd"
    runner = CompiledProgram(program, blob, "cpu").runner
    assert isinstance(runner, CpuRunner)
    assert algorithm(runner) == expected
    image = torch.rand(1, 32, 14, 14)
    both = [CpuRunner(program, blob, algorithms={"layer": name}) for name in ("direct", "winograd")]
    truth: list[dict[int, Tensor]] = [{}, {}, {}]
    for found, trace in zip([runner, *both], truth, strict=True):
        found.run([image], trace, threads=1)
    assert all(torch.equal(truth[0][at], other[at]) for other in truth[1:] for at in truth[0])
    # What is named stays: an algorithm, an instruction set, or that nothing is.
    assert algorithm(CpuRunner(program, blob, algorithms={"layer": "direct"})) == "direct"
    assert algorithm(CpuRunner(program, blob, algorithms={})) == guessed
    named = CpuRunner(program, blob, "portable").native.algorithms
    assert named == CpuRunner(program, blob, "portable", algorithms={}).native.algorithms


def test_each_batch_and_number_of_threads_has_its_own_choice_and_equal_ones_share_weights() -> None:
    program, blob = layer_program(CONV)
    keep(
        {
            CONV: {**times(1e-3, 2e-3), **times(2e-3, 1e-3, threads=2)},
            replace(CONV, batch=16): times(2e-3, 1e-3),
            replace(CONV, batch=128): {"cpu/direct:t1": 1e-9},
        }
    )
    runner = CpuRunner(program, blob)
    assert [algorithm(runner, batch) for batch in (1, 2, 14, 16, 20, 32)] == ["direct"] * 2 + ["winograd"] * 4
    assert [algorithm(runner, 1, threads) for threads in (1, 2)] == ["direct", "winograd"]
    guessed = algorithm(CpuRunner(program, blob, algorithms={}))
    assert algorithm(runner, 128) == guessed  # one alone was timed
    assert algorithm(runner, 1, threads=3) == guessed
    layouts = {id(runner._native(batch, threads)) for batch in (1, 16, 20, 128) for threads in (1, 2, 3)}
    assert len(layouts) == len({"direct", "winograd", guessed})
    for batch, threads in ((1, 1), (1, 2), (3, 1), (16, 2)):
        image = torch.rand(batch, 32, 14, 14)
        guess = CpuRunner(program, blob, algorithms={})
        assert torch.equal(runner.run([image], threads=threads)[0], guess.run([image], threads=threads)[0])


@pytest.mark.skipif("avx512vnni" not in ISAS, reason="this processor lacks AVX-512 VNNI")
@pytest.mark.parametrize(
    ("size", "channels", "guess"), [(2, 64, "lanes"), (4, 128, "lanes"), (7, 512, "winograd"), (56, 64, "winograd")]
)
def test_the_guess_on_small_maps_knows_filters_on_the_lanes(size: int, channels: int, guess: str) -> None:
    """4 x 4 pixels of 128 channels: 6.8 us by lanes, 13.1 us by Winograd, whose vectors of tiles are mostly empty."""
    problem = replace(CONV, height=size, width=size, in_channels=channels, out_channels=channels)
    program, blob = layer_program(problem)
    assert algorithm(CpuRunner(program, blob, "avx512vnni")) == guess


def test_a_choice_that_the_weights_do_not_allow_gives_way() -> None:
    weights = largest_that_fits(4)
    weights[0, 1, 1] += 1
    program, blob = posed(weights, 4, 4)
    problem = problem_of(program.steps[1], program, 1, "cpu")
    keep({problem: times(1e-3, 1e-6)})
    assert algorithm(CpuRunner(program, blob)) == "direct"
    check(program, blob, "auto", batches=(1, 2), share=0.0)


def test_older_tables_are_read_and_choose_nothing() -> None:
    program, blob = layer_program(CONV)
    body = {"version": 2, "device": "cpu", "rows": {key(CONV): {"cpu:t1": 3e-3}}}
    table.user_path("cpu").write_text(json.dumps(body))
    table.forget()
    assert estimate(CONV, threads=1) == 3e-3
    assert table.roof("cpu", 1) is None
    assert algorithm(CpuRunner(program, blob)) == algorithm(CpuRunner(program, blob, algorithms={}))
    known = tuner.known_on_cpu(1)
    assert not known(CONV, {"cpu:t1": 3e-3})  # of which algorithm?
    assert known(CONV, {"cpu:t1": 3e-3, "cpu/direct:t1": 3e-3})
    for other in (replace(CONV, stride=(2, 2)), replace(CONV, groups=32), replace(CONV, op="pool")):
        assert known(other, {"cpu:t1": 3e-3})


def fake(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
    def interleave(calls: Mapping[str, Any], **how: Any) -> dict[str, Times]:
        return {name: Times(name, (seconds[name],)) for name in calls}

    monkeypatch.setattr(stopwatch, "interleave", interleave)


def test_latencies_are_those_of_the_best_algorithm_at_each_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct kernel multiplies bytes whatever the bits; few bits are faster by Winograd alone."""
    slower = {"cpu/lanes:t1": 3e-3}
    fake(monkeypatch, times(2e-3, 1e-3) | slower)
    wide = replace(CONV, w_bits=8, a_bits=8)
    tuner.tune([CONV, wide], lambda problem: tuner.measure_cpu(problem, 1), tuner.known_on_cpu(1), device="cpu")
    rows = table.load("cpu").rows
    assert rows == {key(CONV): times(2e-3, 1e-3) | slower, key(wide): {"cpu/direct:t1": 2e-3} | slower}
    assert estimate(CONV, threads=1) == 1e-3
    assert estimate(wide, threads=1) == 2e-3
    assert estimate(replace(CONV, batch=3), threads=1) == pytest.approx(3e-3)
    assert estimate(CONV, threads=2) is None


def test_a_wrong_algorithm_has_no_time_and_the_other_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"cpu/direct:t1": 2e-3, "cpu/lanes:t1": 3e-3}
    fake(monkeypatch, others | {"cpu/winograd:t1": 1e-3})
    honest = CpuRunner.run

    def run(self: CpuRunner, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, **how: Any) -> list[Tensor]:
        outputs = honest(self, inputs, trace, **how)
        if trace is not None and "winograd" in self.native.algorithms:
            trace[2] = trace[2] ^ 1
        return outputs

    monkeypatch.setattr(CpuRunner, "run", run)
    found = tuner.measure_cpu(CONV, 1)
    assert found.seconds == others
    assert "100.00% of the elements differ from the reference" in found.refused["cpu/winograd:t1"]


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_are_timed_allow_winograd_as_trained_ones_do(seed: int) -> None:
    """Of uniform codes of 4 bits, sums of nine come to a byte's end in a layer this large, with some seeds beyond."""
    problem = replace(CONV, in_channels=512, out_channels=512, height=7, width=7)
    program, blob = layer_program(problem, seed)
    step = program.steps[1]
    assert isinstance(step, ConvStep)
    # The corners, 4 times a weight, reach 60 of the grid's end 15; edges are 2 times a sum of three.
    assert 60 < int(transforms(program, blob, step).abs().max()) <= 110
    assert algorithm(CpuRunner(program, blob, algorithms={"layer": "winograd"})) == "winograd"


def test_the_roof_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbs_kernels.tune.roof.default_threads", lambda: 2)
    keep({CONV: times(1e-3, 2e-3)})
    fake(monkeypatch, {"cpu:t2": 2.0**-10})
    assert measure_roof() == 2.0**40
    fake(monkeypatch, {"cpu:t2": 2.0**-9})
    assert measure_roof() == 2.0**40
    assert measure_roof(again=True) == 2.0**39
    assert table.roof("cpu", 2) == 2.0**39
    assert table.roof("cpu", 1) is None
    assert table.load("cpu").rows == {key(CONV): times(1e-3, 2e-3)}


@pytest.mark.parametrize("rate", [0, -1, "NaN"])
def test_a_roof_that_is_none(rate: float | str) -> None:
    body = {"version": 2, "device": "cpu", "rows": {}, "roofs": {"cpu:t1": rate}}
    table.user_path("cpu").write_text(json.dumps(body))
    with pytest.raises(FormatError, match=r"the roof of cpu:t1 is .*measure again"):
        table.read(table.user_path("cpu"))
