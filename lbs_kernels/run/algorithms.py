"""Which algorithm of the native kernels computes each convolution, where tuning tables tell: the faster one."""

from __future__ import annotations

from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, Program
from lbs_kernels.times import table

# What a measured algorithm asks for. Times are those of other weights, so a winner that does not suit these gives way.
WISHES = {"direct": "direct", "lanes": "lanes-or-direct", "winograd": "winograd-or-direct"}


def measured(program: Program, batch: int, threads: int) -> tuple[str, ...]:
    """What to ask for at every step; "" (the native module's own guess) where no two algorithms were timed."""
    return tuple(
        _fastest(problem_of(step, program, batch, "cpu"), threads) if isinstance(step, ConvStep) else ""
        for step in program.steps
    )


def _fastest(problem: Problem, threads: int) -> str:
    times = table.times(problem)
    own = {name: times[key] for name in WISHES if (key := table.native(threads, name)) in times}
    return WISHES[min(own, key=lambda name: own[name])] if len(own) > 1 else ""
