"""Where the time of a call goes: to the regions of a packed network, and to every part that stays in float."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lbs.packing.model import PackedModel
from lbs.packing.region import PackedRegion
from lbs_kernels.errors import ShapeError
from lbs_kernels.times.stopwatch import Times, interleave

VIEWS = "views and sizes"  # what no report names: how tensors are passed on between the parts
_WARM = 2  # calls that are not timed


@dataclass(frozen=True)
class PartRow:
    """A part that stays in float, by its name and reason in `kept_float`; regions and the rest have no reason.

    seconds: of one call of the network. share: of all parts together.
    """

    name: str
    reason: str | None
    seconds: float
    share: float

    def __str__(self) -> str:
        took = f"{self.seconds * 1e3:.3f} ms, {self.share:.1%} of a call"
        return f"{self.name}: {took}" if self.reason is None else f"in float: {self.name}: {self.reason} ({took})"


def time_parts(packed: PackedModel, images: Tensor, rounds: int = 30) -> tuple[PartRow, ...]:
    """Time every part in calls of the network on the processor: medians over `rounds`, in order of execution.

    Everything in `kept_float` that a call runs has a row; what a model reads once (a weight) has none. None at all
    where the network lies on a GPU, which no clock between two parts sees.

    Raises:
        ShapeError: no rounds, or images the network was not packed for.
    """
    if rounds < 1:
        raise ShapeError(f"rounds = {rounds}; at least one call is timed")
    packed.check_input(images)
    if packed.device.type != "cpu":
        return ()
    clocks: list[dict[str, float]] = []
    with torch.inference_mode():
        for _ in range(_WARM + rounds):
            walk = _Clock(packed.body, dict(packed.kept_float))
            walk.run(images)
            clocks.append(walk.seconds)
    medians = {name: statistics.median(clock[name] for clock in clocks[_WARM:]) for name in clocks[0]}
    total = sum(medians.values())
    reasons = dict(packed.kept_float)
    return tuple(PartRow(name, reasons.get(name), took, took / total) for name, took in medians.items())


def time_call(packed: PackedModel, images: Tensor, rounds: int = 30) -> Times:
    """Seconds of a call of the network on the processor, in a loop, with torch's threads."""
    packed.check_input(images)
    with torch.inference_mode():
        return interleave({"call": lambda: packed(images)}, rounds=rounds)["call"]


def told(parts: tuple[PartRow, ...], kept_float: tuple[tuple[str, str], ...]) -> list[str]:
    """Lines that name all that stays in float, timed where it was, and the regions beside it."""
    timed = {part.name for part in parts}
    untimed = [f"in float: {name}: {reason}" for name, reason in kept_float if name not in timed]
    return untimed + [str(part) for part in parts] if any(part.reason for part in parts) else untimed


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """torch's number of threads, which back ends of the processor take: `threads`, or as it is."""
    before = torch.get_num_threads()
    if threads is not None:
        if threads < 1:
            raise ShapeError(f"threads = {threads}; at least one is needed")
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _region(place: object) -> str:
    return f"region {place}"


class _Clock(fx.Interpreter):
    """Runs the graph around the regions once and adds up what the nodes of each part take."""

    def __init__(self, graph: fx.GraphModule, kept_float: Mapping[str, str]) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # torch.fx would add its own to the message
        self.seconds: dict[str, float] = defaultdict(float)
        self.kept_float = kept_float
        self.part = VIEWS

    def run_node(self, n: fx.Node) -> Any:
        target = str(n.target)
        if n.op == "call_module" and isinstance(self.fetch_attr(target), PackedRegion):
            self.part = _region(target.removeprefix("region"))
        else:
            own = target if n.op == "call_module" else n.name  # files of version 3 tell no more
            self.part = n.meta.get("part", own if own in self.kept_float else VIEWS)
        return super().run_node(n)

    def _timed(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        value = call(target, args, kwargs)
        self.seconds[self.part] += time.perf_counter() - start
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._timed(super().call_module, target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._timed(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._timed(super().call_method, target, args, kwargs)
