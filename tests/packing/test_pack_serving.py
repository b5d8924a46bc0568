"""Many networks in one process: what was laid out for one goes with it, and the others are not slower for it."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.bench_robustness import memory_grown, network
from lbs.packing.model import PackedModel
from lbs_kernels.run import loaded

IMAGE = torch.randn(1, 3, 32, 32)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[object]]:
    """Every runner that is built."""
    build, runners = loaded.CompiledProgram, list[weakref.ref[object]]()

    def remembered(*arguments: object) -> object:
        made = build(*arguments)  # type: ignore[arg-type]
        runners.append(weakref.ref(made.runner))
        return made

    monkeypatch.setattr(loaded, "CompiledProgram", remembered)
    return runners


def test_what_was_built_goes_with_its_network(built: list[weakref.ref[object]]) -> None:
    one = network()
    one(IMAGE)
    assert [ref() is not None for ref in built] == [True]
    del one
    gc.collect()
    assert built[0]() is None


def test_what_was_built_for_an_exported_graph_goes_when_another_is_called(built: list[weakref.ref[object]]) -> None:
    loaded.clear_runners()
    graphs = [torch.export.export(network(), (IMAGE,)).module() for _ in range(2)]
    before = len(built)
    expected = graphs[0](IMAGE)
    assert torch.equal(graphs[0](IMAGE), expected)
    assert [ref() is not None for ref in built[before:]] == [True]  # once, for both calls
    del graphs[0]
    gc.collect()
    assert torch.equal(graphs[0](IMAGE), expected)
    assert [ref() is not None for ref in built[before:]] == [False, True]


def test_many_networks_stay_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than any cache of a fixed size would hold, called in turn."""
    networks = [network() for _ in range(70)]
    expected = networks[0](IMAGE)
    build, count = loaded.CompiledProgram, [0]
    monkeypatch.setattr(loaded, "CompiledProgram", lambda *a: count.__setitem__(0, count[0] + 1) or build(*a))
    for _ in range(3):
        assert all(torch.equal(one(IMAGE), expected) for one in networks)
    assert count == [69]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process its memory so")
def test_memory_after_two_hundred_networks_in_turn() -> None:
    """Each of them leaves at most a quarter of a megabyte; laid out and with what it works in, one has 1.3 MB."""
    assert memory_grown(200) < 50e6


@pytest.mark.slow
def test_a_call_among_many_networks_is_as_fast_as_with_one() -> None:
    def median(one: PackedModel) -> float:
        seconds = []
        for _ in range(1000):
            start = time.perf_counter()
            one(IMAGE)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    networks = [network()]
    alone = min(median(networks[0]) for _ in range(3))
    networks += [network() for _ in range(64)]
    for one in networks:
        one(IMAGE)
    among = min(median(networks[0]) for _ in range(3))
    assert among < 1.3 * alone, (among, alone)
