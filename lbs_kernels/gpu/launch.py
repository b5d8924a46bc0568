"""What binding a step to a kernel gives, and whether kernels may begin before those in front of them have ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError

Launch = Callable[[list[Tensor]], None]  # takes the region's inputs and enqueues one step


def switched_on(name: str) -> bool:
    """Whether an environment variable leaves on what it can turn off: 0 does, 1 and no value do not.

    Raises:
        BackendError: another value.
    """
    value = os.environ.get(name, "1")
    if value not in ("0", "1"):
        raise BackendError(f"{name} is {value!r}; set it to 0, off, or 1, on, or leave it out")
    return value == "1"


_IN_ORDER: ContextVar[bool] = ContextVar("in_order", default=False)


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """What is bound inside begins when all in front of it have ended: where streams fork and join."""
    token = _IN_ORDER.set(True)
    try:
        yield
    finally:
        _IN_ORDER.reset(token)


def overlaps(device: int | None = None) -> bool:
    """Whether the kernels of steps are enqueued by programmatic dependent launch on a GPU, the current one by default.

    They are from compute capability 9.0 on, unless LBS_PDL is 0 or the step is bound `in_order`; looked at where a step
    is bound. docs/cuda.md says why nothing is read or written too early.

    Raises:
        BackendError: another value of LBS_PDL.
    """
    able = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)
    return switched_on("LBS_PDL") and able and not _IN_ORDER.get()
