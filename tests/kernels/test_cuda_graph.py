"""Recording CUDA graphs with a fake driver: warm-ups first, and whatever a graph needs lives exactly as long as it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch

from lbs_kernels.times import graph as cuda_graph


class Driver:
    """Counts; a graph replays by counting, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.replays = False, 0
        self.used: list[tuple[Any, Any]] = []  # pool and stream of every recording
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *arguments: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *arguments: Stream())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.recording)

    @contextlib.contextmanager
    def recording(self, graph: Any, pool: Any, stream: Any) -> Any:
        self.capturing = True
        self.used.append((pool, stream))
        yield
        self.capturing = False

    def replay(self) -> None:
        self.replays += 1


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


class Buffers:
    """Something a recorded call uses."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_calls_warm_up_and_are_recorded_once(driver: Driver) -> None:
    seen: list[bool] = []
    recorded = cuda_graph.record(lambda: seen.append(driver.capturing) or len(seen), "cuda")
    assert seen == [False] * cuda_graph.WARM_UPS + [True]
    assert recorded.result == len(seen)
    recorded.replay()
    assert driver.replays == 1


def test_a_caller_may_warm_up_itself_on_a_stream_of_its_own(driver: Driver) -> None:
    calls: list[bool] = []
    stream = Stream()
    recorded = cuda_graph.record(
        lambda: calls.append(driver.capturing), "cuda", warm_ups=0, stream=stream, pool="shared"
    )  # type: ignore[arg-type]
    assert calls == [True]
    assert driver.used == [("shared", stream)]
    recorded.replay()
    assert calls == [True]
    assert driver.replays == 1


def test_what_a_graph_needs_lives_as_long_as_its_replay(driver: Driver) -> None:
    alive: list[weakref.ref[Buffers]] = []

    def call() -> None:
        if driver.capturing:
            buffers = Buffers()
            alive.append(weakref.ref(buffers))
            cuda_graph.keep(buffers)

    replay = cuda_graph.record(call, "cuda").replay
    gc.collect()
    assert alive[0]() is not None
    del replay
    gc.collect()
    assert alive[0]() is None


def test_a_recording_that_fails_keeps_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "_kept", [[]])

    def call() -> None:
        if driver.capturing:
            cuda_graph.keep("buffers")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_graph.record(call, "cuda")
    assert cuda_graph._kept == [[]]
    cuda_graph.keep("of somebody else's graph")
    assert cuda_graph._kept == [["of somebody else's graph"]]
