from __future__ import annotations

import time

import pytest

from lbs_kernels.errors import ShapeError
from lbs_kernels.times import stopwatch
from lbs_kernels.times.stopwatch import SelfTimed, Times, interleave, quantile


class Clock:
    """A clock that only the contenders move: makes measurements exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def contender(self, name: str, seconds: float) -> object:
        def call() -> None:
            self.now += seconds
            self.order.append(name)

        return call


def test_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    contenders = {"slow": clock.contender("slow", 4e-3), "fast": clock.contender("fast", 1e-3)}
    times = interleave(contenders, rounds=5, warmup=0.01)
    assert list(times) == ["slow", "fast"]
    assert times["slow"].median == pytest.approx(4e-3)
    assert times["fast"].p20 == pytest.approx(1e-3) == times["fast"].p80
    assert times["fast"].ratio(times["slow"]) == pytest.approx(4.0)
    assert str(times["fast"]) == "fast: 1000.0 us [1000.0 1000.0]"


def test_contenders_alternate_and_take_turns_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    contenders = {name: clock.contender(name, stopwatch.AWAKE) for name in "abc"}
    told: list[str] = []
    interleave(contenders, rounds=4, warmup=0.0005, before=told.append)
    assert "".join(told) == "abc" + "abc" + "bca" + "cab" + "abc"  # before a contender's warm-up and every measurement
    assert "".join(clock.order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"  # warm-up, then untimed and timed


def test_a_contender_is_called_until_its_threads_are_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    interleave({"a": clock.contender("a", stopwatch.AWAKE / 8)}, rounds=1, warmup=0.0)
    assert len(clock.order) == 1 + 8 + 1  # warm-up, untimed, timed


def test_no_round_begins_behind_the_limit_once_there_are_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow = {"a": clock.contender("a", 2.0)}  # 4 s a round: one call to wake, one timed
    assert len(interleave(slow, rounds=30, limit=1.0, warmup=0.0)["a"].seconds) == stopwatch.LEAST
    assert len(interleave(slow, rounds=30, limit=27.0, warmup=0.0)["a"].seconds) == 7  # the last begins at 24 s
    assert len(interleave(slow, rounds=3, limit=1.0, warmup=0.0)["a"].seconds) == 3
    assert len(interleave(slow, rounds=30, warmup=0.0)["a"].seconds) == 30


def test_the_first_call_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(stopwatch.time, "sleep", lambda seconds: clock.order.append(f"pause {seconds}"))
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: 0.0)
    times = interleave({"a": clock.contender("a", 2.0**-20)}, rounds=2, warmup=0.0, first_call=True)
    assert clock.order == ["a", *[f"pause {stopwatch.SETTLE}", f"pause {stopwatch.LOOK}", "a"] * 2]
    assert times["a"].median == pytest.approx(2.0**-20)


@pytest.mark.parametrize(("spinning", "looks"), [(0.0, 1), (0.09, 14), (1e9, 395)])
def test_threads_that_spin_are_waited_for_as_long_as_it_takes(
    spinning: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work for `spinning` seconds from now on, all of every pause; nobody waits for ever."""
    clock = Clock(monkeypatch)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(stopwatch.time, "sleep", sleep)
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: min(clock.now, spinning))
    interleave({"a": clock.contender("a", stopwatch.AWAKE)}, rounds=1, warmup=0.0)
    assert pauses[0] == stopwatch.SETTLE
    assert abs(len(pauses) - 1 - looks) <= 6


def test_warm_up_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    interleave({"a": clock.contender("a", 1e-3)}, rounds=1, warmup=0.0205)
    assert len(clock.order) == 21 + 2 + 1  # warm-up, awake, timed


def test_short_calls_are_repeated_until_the_clock_can_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = interleave({"a": clock.contender("a", 2.0**-20)}, rounds=3, warmup=2.0**-20)
    repeats = (len(clock.order) - 1) / 3 - stopwatch.AWAKE * 2.0**20
    assert repeats * 2.0**-20 >= stopwatch.MIN_SPAN
    assert times["a"].median == pytest.approx(2.0**-20)


@pytest.mark.parametrize("seconds", [25e-6, 60e-6, 1e-3])
def test_on_a_gpu_the_latency_of_the_first_call_is_shared_by_many(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency, clock, counts = 20e-6, Clock(monkeypatch), []
    monkeypatch.setattr(stopwatch.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(stopwatch, "_cuda_clock", lambda device, cold: lambda call, calls: counts.append(calls) or 1.0)
    interleave({"graph": clock.contender("graph", seconds + latency)}, device="cuda", rounds=1, warmup=1e-3)
    assert latency / (counts[0] * seconds) < 0.02


def test_real_time_is_measured() -> None:
    times = interleave({"sleep": lambda: time.sleep(0.01), "nothing": lambda: None}, rounds=3, warmup=0.01)
    assert 0.01 <= times["sleep"].median < 0.1
    assert times["nothing"].median < 1e-3


def test_a_contender_may_time_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    whole = clock.contender("step", 1e-3)
    times = interleave({"step": SelfTimed(lambda: whole() or 2.5e-4)}, rounds=3, warmup=1e-3)
    assert times["step"].median == pytest.approx(2.5e-4)
    assert len(clock.order) == 1 + 3


def test_ratio_pairs_rounds() -> None:
    """Both slow down in the same rounds: the ratio does not see it, the medians do."""
    ours, theirs = Times("ours", (1.0, 2.0, 4.0, 8.0)), Times("theirs", (2.0, 4.0, 8.0, 16.0))
    reordered = Times("theirs", (16.0, 8.0, 4.0, 2.0))
    assert ours.ratio(theirs) == 2.0
    assert ours.ratio(reordered) != 2.0
    with pytest.raises(ShapeError, match="time them in one run"):
        ours.ratio(Times("other", (1.0,)))


def test_quantiles_interpolate() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert quantile([10.0, 0.0], 0.8) == 8.0
    assert quantile([7.0], 0.2) == 7.0


def test_no_rounds_is_refused() -> None:
    with pytest.raises(ShapeError, match="rounds = 0"):
        interleave({"a": lambda: None}, rounds=0)


@pytest.mark.gpu
def test_events_and_graphs_on_a_gpu() -> None:
    import torch

    x = torch.randn(2048, 2048, device="cuda")
    graph = stopwatch.cuda_graph(lambda: x @ x)
    times = interleave({"eager": lambda: x @ x, "graph": graph}, device="cuda", rounds=5, warmup=0.05)
    cold = interleave({"graph": graph}, device="cuda", rounds=5, warmup=0.05, cold_l2=True)
    for measured in (*times.values(), *cold.values()):
        assert 1e-6 < measured.median < 1.0
