"""Many callers of the native runner at once, every answer checked, none waiting for another; no threads to be had; and
callers under ThreadSanitizer."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import replay
import torch
from programs import CASES, random_inputs
from test_native_runner import call, equal, native
from torch import Tensor

from benchmarks.bench_robustness import alone_and_beside
from lbs_kernels import device
from lbs_kernels.program.steps import Program
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


@contextmanager
def in_a_loop(work: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """`work` in another thread again and again; gives how often it has ended."""
    ended, stop = [0], threading.Event()

    def loop() -> None:
        while not stop.is_set():
            work()
            ended[0] += 1

    other = threading.Thread(target=loop)
    other.start()
    try:
        yield lambda: ended[0]
    finally:
        stop.set()
        other.join()


def case_of(batch: int) -> tuple[Program, object, list[Tensor]]:
    program, blob = CASES["preact_residual"](5)
    return program, native(program, blob), random_inputs(program, batch, seed=6)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_does_not_wait_for_another(threads: int) -> None:
    """Of one network. Calls that begin and end in the middle half of a long one have not waited for it."""
    program, runner, inputs = case_of(8000)
    short, spans = [x[:1].contiguous() for x in inputs], list[tuple[float, float]]()
    arguments = [([x.data_ptr() for x in part], call(runner, program, part, threads)) for part in (inputs, short)]

    def timed(which: int) -> tuple[float, float]:
        (given, results), start = arguments[which], time.monotonic()
        runner.run(given, [y.data_ptr() for y in results], (8000, 1)[which], threads)  # type: ignore[attr-defined]
        return start, time.monotonic()

    with in_a_loop(lambda: spans.append(timed(0))):
        calls = list[tuple[float, float]]()
        while len(spans) < 4:
            calls.append(timed(1))
    middles = [(start + (end - start) / 4, end - (end - start) / 4) for start, end in spans]
    inside = [sum(first < start and end < last for start, end in calls) for first, last in middles]
    assert sum(inside) > 0, inside


@pytest.mark.slow
def test_the_time_of_one_image_beside_a_large_batch() -> None:
    """Batch 1 beside another thread's batch 512: at most three times as long as alone, in the median."""
    if device.processors() < 2:
        pytest.skip("two processors are needed for two callers")
    alone, beside = alone_and_beside()
    assert beside <= 3 * alone, (beside, alone)


def test_many_callers_leave_the_memory_of_a_few() -> None:
    program, runner, inputs = case_of(1)
    call(runner, program, inputs, 1)
    of_one, callers = runner.held_bytes, 4 * max(8, device.processors())  # type: ignore[attr-defined]
    together = threading.Barrier(callers)

    def work() -> None:
        for _ in range(20):
            together.wait(timeout=60)
            call(runner, program, inputs, 1)

    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert of_one <= runner.held_bytes <= max(8, device.processors()) * of_one  # type: ignore[attr-defined]


def test_no_thread_to_be_had() -> None:
    """Where a process may start no more threads, calls are served by the caller; and by more once it may again."""
    code = """
import os, resource, sys, time, torch
sys.path.insert(0, {tests!r})
from programs import CASES, random_inputs
from test_native_runner import call, equal, native
program, blob = CASES["preact_residual"](5)
inputs = random_inputs(program, 7, seed=6)
runner = native(program, blob)
expected = call(runner, program, inputs, 1)
if os.getuid() == 0:
    os.setuid(65534)  # the limit does not hold for the administrator
most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (0, most))
threads = len(os.listdir("/proc/self/task"))
for _ in range(3):
    assert equal(call(runner, program, inputs, 4), expected)
assert len(os.listdir("/proc/self/task")) == threads
resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
time.sleep(1.1)
for _ in range(3):
    assert equal(call(runner, program, inputs, 4), expected)
assert len(os.listdir("/proc/self/task")) == threads + 3
"""
    code = code.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_callers_under_thread_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network of the tests in turn, eight callers, some of another one beside it: no race is found."""
    path = tmp_path / "cases"
    replay.write(path, replay.networks())
    program = replay.build("thread_sanitizer", monkeypatch, "g++", "-fsanitize=thread -O1 -g", portable_only=True)
    words = replay.run(program, path, "--callers", CALLERS, "--seconds", 60, TSAN_OPTIONS="halt_on_error=1")
    assert int(words.split()[0]) > 10 * CALLERS, words
