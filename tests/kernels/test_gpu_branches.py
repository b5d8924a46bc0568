"""Steps that run beside others in a recorded graph: which do, that no memory is shared, and how they are enqueued."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import programs
import pytest
import torch
from s8_cases import deep, shortcuts

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.branches import branches, enqueue, first_reader
from lbs_kernels.gpu.configs.cost import FORK, H200, resident, seconds
from lbs_kernels.gpu.configs.cuda import S8Config
from lbs_kernels.gpu.configs.defaults import DEFAULTS, weighted_defaults
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.layout import Slot, plan_arena, read_by, written_by
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, Program

LAYER = Problem("bitconv2d", 1, 14, 14, 256, 256, (3, 3), (1, 1), (1, 1), w_bits=8, a_bits=8, device="cuda")


def chosen(program: Program, batch: int) -> list[tuple[Problem, Any]]:
    """Problem and configuration of every step, as on compute capability 9.0."""
    found = []
    for step in program.steps:
        problem = problem_of(step, program, batch, "cuda")
        hopper = weighted_defaults(problem, hopper=True) if isinstance(step, ConvStep) else DEFAULTS[step.op](problem)
        found.append((problem, next(iter(hopper))))
    return found


def test_shortcuts_run_beside_the_layers_that_do_not_read_them() -> None:
    program, _ = shortcuts(3)
    few = chosen(program, 1)
    assert branches(program, few) == {1: 3, 4: 6, 7: 9}
    for place in (1, 4, 7):  # step + 1 runs meanwhile, the next one joins
        assert program.steps[place + 2].emit.residual in written_by(program.steps[place])
        assert min(seconds(*few[place]), seconds(*few[place + 1])) > FORK
    assert branches(program, chosen(program, 128)) == {}  # either side fills the machine
    chain, _ = deep(4)
    assert branches(chain, chosen(chain, 1)) == {}  # each step reads the one before


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = shortcuts(1)
    monkeypatch.setenv("LBS_FORK", "0")
    assert branches(program, chosen(program, 1)) == {}
    monkeypatch.setenv("LBS_FORK", "yes")
    with pytest.raises(BackendError, match="LBS_FORK is 'yes'; set it to 0, off"):
        branches(program, chosen(program, 1))


def test_room_is_counted_in_blocks() -> None:
    """14 x 14 pixels and 256 filters: 4 by 4 tiles of 64 x 64, 7 by 4 of 32 x 64."""
    shared = S8Config(*S8Config.clusters[0], split=8)
    assert resident(LAYER, shared) == 16 * 8 / (2 * H200.multiprocessors)
    assert resident(LAYER, S8Config("wgmma", 64, 64, 12)) == 16 / H200.multiprocessors
    assert resident(LAYER, GemmConfig(32, 64, 4, 4, 3, weights_first=True, split_k=8)) == 7 * 4 * 8 / (
        2 * H200.multiprocessors
    )
    assert resident(LAYER, GemmConfig(128, 128, 4, 8, 3, weights_first=False)) == 2 * 2 / H200.multiprocessors
    assert resident(LAYER, object()) is None


def clashes(program: Program, beside: dict[int, int], slots: dict[int, Slot]) -> list[tuple[int, int]]:
    """Tensors that a step of a branch writes and one that runs at the same time touches, in memory they share."""

    def overlapping(a: Slot, b: Slot) -> bool:
        return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes

    found = []
    for place, join in beside.items():
        aside = program.steps[place]
        for other in program.steps[place + 1 : join]:
            for writer, reader in ((aside, other), (other, aside)):
                touched = [index for index in (*read_by(reader), *written_by(reader)) if index in slots]
                found += [(w, t) for w in written_by(writer) for t in touched if overlapping(slots[w], slots[t])]
    return found


@pytest.mark.parametrize("name", ["shortcuts", *sorted(programs.CASES), *map(str, range(40))])
def test_steps_that_run_at_once_share_no_memory(name: str) -> None:
    """For every branch there could be."""
    if name == "shortcuts":
        program, _ = shortcuts(3, between=2)
    else:
        program, _ = programs.random_program(int(name)) if name.isdecimal() else programs.CASES[name](seed=1)
    for place in range(len(program.steps)):
        join = first_reader(program, place)
        if join is not None:
            slots, _ = plan_arena(program, 2, {place: join})
            assert not clashes(program, {place: join}, slots)


def test_memory_planned_for_one_stream_would_be_shared() -> None:
    program, _ = shortcuts(3, between=2)
    beside = branches(program, chosen(program, 1))
    assert beside == {1: 4, 5: 8, 9: 12}
    alone, size = plan_arena(program, 1)
    assert clashes(program, beside, alone)
    slots, more = plan_arena(program, 1, beside)
    assert not clashes(program, beside, slots)
    assert more >= size
    assert plan_arena(program, 1, {}) == (alone, size)


class Stream:
    """Tells what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_streams_fork_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    current, aside = Stream("current", log), Stream("aside", log)
    on = [current]

    @contextlib.contextmanager
    def stream(other: Stream) -> Iterator[None]:
        on.append(other)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    launches = [lambda inputs, place=place: log.append(f"{place} on {on[-1].name}") for place in range(7)]
    enqueue(launches, [], {1: 3, 4: 6}, current, aside)  # type: ignore[arg-type]
    fork, join = "aside waits for current", "current waits for aside"
    first = ["0 on current", fork, "1 on aside", "2 on current", join, "3 on current"]
    assert log == [*first, fork, "4 on aside", "5 on current", join, "6 on current"]
    log.clear()
    enqueue(launches, [], {}, current, aside)  # type: ignore[arg-type]
    assert log == [f"{place} on current" for place in range(7)]
