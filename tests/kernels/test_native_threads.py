"""Many callers of the native runner at once, every answer checked; and the same under ThreadSanitizer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import replay
import torch
from programs import CASES, random_inputs
from test_native_runner import call, equal, native

from lbs_kernels.run.reference import ReferenceRunner

CALLERS = 8


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_threads_call_one_program(seconds: int) -> None:
    """With batches and numbers of threads of their own, on memory and a pool that they share."""
    program, blob = CASES["preact_residual"](5)
    inputs = random_inputs(program, 7, seed=6)
    expected = ReferenceRunner(program, blob).run(inputs)
    runner = native(program, blob)
    end, answers, wrong = time.monotonic() + seconds, [0] * CALLERS, list[tuple[int, int]]()

    def work(caller: int) -> None:
        chance = torch.Generator().manual_seed(caller)
        while time.monotonic() < end and not wrong:
            batch, threads = (int(torch.randint(1, n, (), generator=chance)) for n in (8, 5))
            found = call(runner, program, [x[:batch].contiguous() for x in inputs], threads)
            if not equal(found, [y[:batch] for y in expected]):
                wrong.append((batch, threads))
            answers[caller] += 1

    callers = [threading.Thread(target=work, args=(caller,)) for caller in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    assert min(answers) > 10, answers


@pytest.mark.slow
def test_callers_under_thread_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network of the tests in turn, eight callers, some of another one beside it: no race is found."""
    path = tmp_path / "cases"
    replay.write(path, replay.networks())
    program = replay.build("thread_sanitizer", monkeypatch, "g++", "-fsanitize=thread -O1 -g", portable_only=True)
    words = replay.run(program, path, "--callers", CALLERS, "--seconds", 60, TSAN_OPTIONS="halt_on_error=1")
    assert int(words.split()[0]) > 10 * CALLERS, words
