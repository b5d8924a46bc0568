"""Training steps on a GPU as CUDA graphs: recorded once they have run a few times, then replayed as a whole.

A search step of a small network is some thousand kernels of a few microseconds each. Launched one by one they take the
host several times as long as the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import first_line
from lbs_kernels.times.graph import Recorded, record

SINGLE_STEPS = 3  # of every kind before it is recorded: compilation, cuDNN's choice of kernels, the optimizer's state


class RecordedSteps:
    """Calls `work(images, labels)`, which returns a loss and reads nothing back, or replays what it has launched.

    One recording for every shape of the batch and `side`, which names what else decides about the work. A network whose
    step cannot be recorded, because it waits for the device say, goes on step by step: `launches` tells why. Work is
    always launched on a stream of its own, in turn with the current one, because autograd goes back on the streams it
    has come by, and recorded work must not meet others.
    """

    def __init__(self, work: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self.work, self.device = work, device
        self.launches = "single"
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: Counter[Any] = Counter()
        self._found: dict[Any, tuple[Recorded, Tensor, Tensor]] = {}
        self._possible = True

    def __call__(self, images: Tensor, labels: Tensor, side: str = "") -> Tensor:
        """The loss of a batch; the next call overwrites it."""
        key = side, images.shape, images.dtype
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._possible and self._seen[key] == SINGLE_STEPS:
                self._record(key, images, labels)
            self._seen[key] += 1
            loss = self._replayed(key, images, labels) if key in self._found else self.work(images, labels)
        current.wait_stream(self._stream)
        return loss

    def _replayed(self, key: Any, images: Tensor, labels: Tensor) -> Tensor:
        recorded, own_images, own_labels = self._found[key]
        own_images.copy_(images)
        own_labels.copy_(labels)
        recorded.replay()
        loss: Tensor = recorded.result
        return loss

    def _record(self, key: Any, images: Tensor, labels: Tensor) -> None:
        """Nothing runs meanwhile. Recordings share their memory: they never run at the same time."""
        if key[0] == "frozen":  # no gate moves any more
            self._found.clear()
        inputs = images.clone(), labels.clone()
        generator = torch.cuda.default_generators[images.device.index]
        before = generator.clone_state()
        try:
            found = record(lambda: self.work(*inputs), self.device, warm_ups=0, stream=self._stream, pool=self._pool)
        except RuntimeError as error:
            generator.graphsafe_set_state(before)  # torch leaves it in a recording that goes on, of no use to others
            self._possible = False
            self._found.clear()
            self.launches = f"single: a step could not be recorded ({_first_cause(error)})"
            return
        self._found[key] = (found, *inputs)
        self.launches = "CUDA graphs"


def _first_cause(error: BaseException) -> str:
    """One line of what went wrong first: the end of a recording that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)
