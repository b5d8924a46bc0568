"""What binding a step to a kernel gives, and whether kernels may begin before those in front of them have ended."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError

Launch = Callable[[list[Tensor]], None]  # takes the region's inputs and enqueues one step


def overlaps(device: int | None = None) -> bool:
    """Whether the kernels of steps are enqueued by programmatic dependent launch on a GPU, the current one by default.

    They are from compute capability 9.0 on, unless LBS_PDL is 0: it is read where a step is bound. docs/cuda.md says
    why nothing is read or written too early.

    Raises:
        BackendError: another value of LBS_PDL than 0 and 1.
    """
    wanted = os.environ.get("LBS_PDL", "1")
    if wanted not in ("0", "1"):
        raise BackendError(f"LBS_PDL is {wanted!r}; set it to 0, kernels follow one another, or 1, they may overlap")
    return wanted == "1" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)
