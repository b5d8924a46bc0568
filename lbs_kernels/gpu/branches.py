"""Which steps of a program run beside those behind them, on a second stream of a recorded graph.

A step whose result nobody reads for a while, such as the convolution of a shortcut, does not hold up those in between:

    step          runs on the second stream, behind all in front of it
    step + 1 ..   run meanwhile, as they read nothing of it
    join          is the first that does, and waits for both

At batch 1, where launches are most of the time and blocks are few. Memory is planned for it (`layout.lifetimes`), and
where streams fork and join nothing is launched before what is in front of it has ended (`launch.in_order`). LBS_FORK=0
leaves all on one stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.gpu.configs.cost import FORK, H200, Machine, resident, seconds
from lbs_kernels.gpu.launch import Launch, switched_on
from lbs_kernels.gpu.layout import read_by, written_by
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program


def branches(program: Program, chosen: Sequence[tuple[Problem, Any]], machine: Machine = H200) -> dict[int, int]:
    """Place of a step -> that of its join, where the model of `cost.py` finds that it saves time.

    It does where the blocks of both sides find room at once: then the shorter one is for nothing, but for the fork.

    Args:
        chosen: problem and configuration of every step.

    Raises:
        BackendError: another value of LBS_FORK than 0 and 1.
    """
    found: dict[int, int] = {}
    if not switched_on("LBS_FORK"):
        return found
    free = 0  # the first place that no branch has
    for place in range(len(program.steps)):
        join = first_reader(program, place)
        if place < free or join is None:
            continue
        aside, between = chosen[place], chosen[place + 1 : join]
        room = [resident(*one, machine) for one in (aside, *between)]
        if not between or any(share is None for share in room):
            continue
        shares = [share for share in room if share is not None]
        saved = min(seconds(*aside, machine), sum(seconds(*one, machine) for one in between)) - FORK
        if shares[0] + max(shares[1:]) <= 1.0 and saved > 0:
            found[place] = free = join
    return found


def first_reader(program: Program, place: int) -> int | None:
    """Place of the first step that reads what a step writes, or None."""
    written = set(written_by(program.steps[place]))
    later = range(place + 1, len(program.steps))
    return next((at for at in later if written & set(read_by(program.steps[at]))), None)


def enqueue(
    launches: Sequence[Launch],
    inputs: list[Tensor],
    beside: Mapping[int, int],
    current: torch.cuda.Stream,
    aside: torch.cuda.Stream,
) -> None:
    """Enqueue all launches on `current`, those of branches on `aside`, which forks from it and joins it again."""
    joins = set(beside.values())
    for place, launch in enumerate(launches):
        if place in joins:
            current.wait_stream(aside)
        if place not in beside:
            launch(inputs)
            continue
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            launch(inputs)
