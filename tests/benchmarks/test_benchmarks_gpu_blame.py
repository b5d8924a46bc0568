"""Which contender is blamed for a broken device: on one that breaks when it is told to, and says so when waited for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_models
from benchmarks.gpu_run import Attempts
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import stopwatch
from lbs_kernels.times.graph import Recorded
from lbs_kernels.tune import tuner

PROBLEM = Problem("bitconv2d", 1, 4, 4, 8, 8, w_bits=2, a_bits=2, device="cuda")
OWN, KERNELS = "half", ("triton:a", "triton:b", "cuda:c")
RACE = "race"


class Device:
    """Work is enqueued; the `moment`-th of `bad` (or its first while it is timed) breaks the device, unnoticed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: str = "", moment: int | str = 0) -> None:
        self.bad, self.moment, self.count = bad, moment, 0
        self.broken = self.timed = False
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(stopwatch, "record", self.record)
        monkeypatch.setattr(stopwatch, "_cuda_clock", lambda device, cold_l2: self.measure)
        monkeypatch.setattr(tuner, "Layer", self.layer)
        monkeypatch.setattr(tuner, "shortlist", lambda problem, limit: [SimpleNamespace(name=name) for name in KERNELS])

    def enqueue(self, name: str) -> None:
        if name == self.bad:
            self.count += 1
            self.broken |= self.timed if self.moment == RACE else self.count == self.moment

    def wait(self, device: object = None) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: misaligned address")

    def record(self, call: Callable[[], object]) -> Recorded:
        call()
        return Recorded(call, None)  # type: ignore[arg-type]

    def measure(self, call: Callable[[], object], calls: int) -> float:
        self.timed = True
        call()
        self.timed = False
        self.wait()
        return 1e-6

    def layer(self, problem: Problem, device: torch.device) -> SimpleNamespace:
        self.enqueue(tuner.REFERENCE)
        self.wait()
        return SimpleNamespace(launch=self.launch)

    def launch(self, choice: SimpleNamespace) -> Callable[[], object]:
        self.enqueue(choice.name)
        self.wait()  # the comparison
        return functools.partial(self.enqueue, choice.name)

    def tune(self, attempt: Callable[[str], bool]) -> tuner.Measured:
        own = {OWN: functools.partial(self.enqueue, OWN)}
        return tuner.measure_gpu(
            PROBLEM, torch.device("cuda"), rounds=3, others=lambda layer: dict(own), attempt=attempt
        )


@pytest.mark.parametrize("moment", [1, 2, 3, 4, RACE])  # launch, recording, first replay, warm-up, a timed call
@pytest.mark.parametrize("bad", [OWN, *KERNELS])
def test_what_breaks_the_device_is_blamed_and_nothing_else(
    bad: str, moment: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="misaligned address"):
        Device(monkeypatch, bad, moment).tune(Attempts(tmp_path, "layers"))
    assert Attempts(tmp_path, "layers").blame() == f"{PROBLEM} {bad}"
    found = Device(monkeypatch).tune(Attempts(tmp_path, "layers"))  # the next process
    assert found.refused == {bad: tuner.BROKE}
    assert set(found.times) == {OWN, *KERNELS} - {bad}
    assert set(found.seconds) == set(KERNELS) - {bad}


def test_the_reference_is_not_blamed_on_the_kernel_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Attempts(tmp_path, "layers")("an earlier kernel")
    with pytest.raises(RuntimeError, match="misaligned address"):
        Device(monkeypatch, tuner.REFERENCE, 1).tune(Attempts(tmp_path, "layers"))
    assert Attempts(tmp_path, "layers").blame() == f"{PROBLEM} reference"
    found = Device(monkeypatch).tune(Attempts(tmp_path, "layers"))
    assert (found.seconds, found.refused) == ({}, {tuner.REFERENCE: tuner.BROKE})


@pytest.mark.parametrize("bad", ["torch float32", "w4a4"])
def test_a_network_that_breaks_the_device_in_the_race(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, bad, RACE)
    calls = {name: functools.partial(device.enqueue, name) for name in ("torch float32", "w4a4", "w2a2")}
    with pytest.raises(RuntimeError, match="misaligned address"):
        gpu_models.measure("net", 1, calls, Attempts(tmp_path, "models"))
    assert Attempts(tmp_path, "models").blame() == f"net 1 {bad}"
