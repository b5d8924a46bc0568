"""Where the GPU suite runs. On "cpu", with Triton's interpreter, all of it runs but for the graphs: for its tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbs_kernels.times import stopwatch

DEVICE = "cuda"


def device() -> torch.device:
    """The device everything is timed on."""
    return torch.device(DEVICE)


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call."""
    return stopwatch.cuda_graph(call) if device().type == "cuda" else call


def survive() -> None:
    """Raises RuntimeError where an error has broken the device's context, so that nothing can run any more."""
    if device().type == "cuda":
        torch.cuda.synchronize()
