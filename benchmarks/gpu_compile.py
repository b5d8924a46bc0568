"""Compiles Triton kernels in many processes at once into Triton's cache, where the process that times finds them.

A kernel takes 0.5 to 1 s to compile and a layer has a dozen candidates: one process alone would spend the whole lease
on it. Workers bind launches on CPU tensors, whose addresses are all a compiler asks for, and compile without launching.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch

from lbs_kernels.gpu import kernels
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.tune import tuner


class Compiler:
    """A pool of compiling processes. Jobs are named; `wait` returns once a job is done, failed, or the time is up."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process that uses CUDA breaks both
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
        self.jobs: dict[Any, Future[Any]] = {}

    def submit(self, name: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Add a job; its function must be importable."""
        self.jobs[name] = self.pool.submit(function, *arguments)

    def wait(self, name: Any, until: float) -> str:
        """Empty where the job was done by `until` (time.time()), else why not. Its kernels are then compiled late."""
        job = self.jobs.pop(name, None)
        if job is None:
            return "it was not submitted"
        try:
            job.result(timeout=max(0.0, until - time.time()))
        except Exception as error:  # noqa: BLE001  a job that fails here fails again, in words, where it is used
            return f"{type(error).__name__}: {error}"
        return ""

    def stop(self) -> None:
        """Forget the jobs that have not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def workers() -> int:
    """One process per processor but two, which time and enqueue."""
    return max(1, (os.cpu_count() or 1) - 2)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    os.nice(5)


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Inside, runners may be built on CPU tensors, and launches of Triton kernels compile and do not run."""
    from triton.runtime.jit import JITFunction

    from lbs_kernels.gpu import runner

    class Yes:
        value = True

    run, interpreted = JITFunction.run, runner.INTERPRETED
    JITFunction.run = functools.partialmethod(_warm_up, run)
    runner.INTERPRETED = Yes  # type: ignore[assignment]
    try:
        yield
    finally:
        JITFunction.run, runner.INTERPRETED = run, interpreted


def _warm_up(self: Any, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return run(self, *arguments, **{**options, "warmup": True})


def compile_layer(problem: Problem, limit: int | None) -> int:
    """Compile what `tuner.measure_gpu` will run on one problem; returns how many configurations."""
    from lbs_kernels.gpu.runner import GpuRunner

    program, blob = layer_program(problem)
    image = torch.empty(16)
    done = 0
    with compile_only():
        for choice in tuner.shortlist(problem, limit):
            if choice.kernel.family != "triton":
                continue  # compiled by the build
            plan = GpuRunner(program, blob, "cpu", {LAYER: choice.config}).plan(problem.batch)
            for launch in plan.launches:
                launch([image])
            done += 1
    return done


def compile_network(path: str, batch: int, share: tuple[int, int] = (0, 1)) -> int:
    """Compile the launches of a packed network (its file) at one batch size, as the tuning tables choose them.

    Args:
        share: (i, n) takes the i-th of n equal parts of its distinct problems.
    """
    import lbs
    from lbs_kernels.gpu.runner import GpuRunner
    from lbs_kernels.program.problem import problem_of
    from lbs_kernels.program.steps import IMAGE_DTYPES

    done = 0
    with compile_only():
        for region in lbs.load(path).regions:
            program, blob = kernels.program_on(region.program, region.blob, "cuda")
            # The choice is that of the device; the tensors lie on the processor.
            problems = {step.name: problem_of(step, program, batch, "cuda") for step in program.steps}
            choices = {name: kernels.choose(problem) for name, problem in problems.items()}
            configs = {name: choice.config for name, choice in choices.items() if choice.kernel.family == "triton"}
            mine = set(list(dict.fromkeys(problems.values()))[share[0] :: share[1]])
            plan = GpuRunner(program, blob, "cpu", configs, families=("triton",)).plan(batch)
            images = [torch.empty(16, dtype=IMAGE_DTYPES[program.tensors[index].dtype]) for index in program.inputs]
            for step, launch in zip(program.steps, plan.launches, strict=True):
                if step.name in configs and problems[step.name] in mine:
                    launch(images)
                    done += 1
    return done
