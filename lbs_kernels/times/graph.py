"""CUDA graphs: work recorded once and replayed as a whole, without the cost of its single launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS = 3  # allocations, compilation and cuDNN's choice of kernels must lie behind before the recording


# What a graph reads and writes, innermost recording last. Nobody tells when a graph that was recorded elsewhere goes:
# what those need, the first list, stays until the process ends.
_kept: list[list[Any]] = [[]]


def keep(thing: Any) -> None:
    """While a graph is recorded: `thing` shall live as long as the graph."""
    _kept[-1].append(thing)


@dataclass(frozen=True)
class Recorded:
    """A graph. replay: enqueues it on the current stream. result: of the recorded call; every replay overwrites it."""

    replay: Callable[[], None]
    result: Any


def record(
    call: Callable[[], Any],
    device: torch.device | str | None = None,
    *,
    warm_ups: int = WARM_UPS,
    stream: torch.cuda.Stream | None = None,
    pool: Any = None,
) -> Recorded:
    """Record `call`, which must read its inputs from where they will stay.

    It runs `warm_ups` times before, on `stream` (by default one of its own). Memory it allocates while it is recorded
    belongs to the graph, or to `pool`, for graphs that never run at the same time. The graph keeps `call`, and with it
    whatever else it reads and writes.
    """
    with torch.cuda.device(device):
        stream = stream or torch.cuda.Stream()
        if warm_ups:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warm_ups):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        kept: list[Any] = [call]
        _kept.append(kept)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = call()
        finally:
            _kept.pop()

    def replay(kept: list[Any] = kept) -> None:
        graph.replay()

    return Recorded(replay, result)


class Turns:
    """Lets work on buffers that calls share follow one another, whatever stream each call is made on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._done: torch.cuda.Event | None = None

    def begin(self) -> None:
        """The current stream waits for the turn before; the host does not."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)

    def end(self) -> None:
        """The turn ends with the work enqueued so far."""
        if self._done is None:
            self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(self.device))
