"""Which back end runs a program: each answers with None or the reason why it cannot. One row of `BACKENDS` adds one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from lbs_kernels import extension
from lbs_kernels.errors import BackendError


def _reference_why_not(device_type: str) -> str | None:
    return None


def _cpu_why_not(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it runs on the processor, the tensors lie on {device_type}"
    return None if extension.cpu is not None else extension.cpu_reason


def _triton_why_not(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it: pip install triton"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors lie on {device_type}; move them to a GPU, or set TRITON_INTERPRET=1 to test without one"


# Order = default preference. "gpu" takes the best kernel for each step, "triton" only those in Triton; the interpreter
# never is a default: on the CPU they only run where they are named.
BACKENDS: dict[str, Callable[[str], str | None]] = {
    "cpu": _cpu_why_not,
    "gpu": _triton_why_not,
    "triton": _triton_why_not,
    "reference": _reference_why_not,
}
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("gpu", "reference")}


def why_not(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of this device type ("cpu", "cuda"), or None where it can.

    Raises:
        BackendError: no such back end.
    """
    if backend not in BACKENDS:
        raise BackendError(f"back end {backend!r} does not exist; choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](device_type)


def resolve(backend: str, device_type: str) -> str:
    """The back end for a whole program: the one named, or the first of the default order that can run.

    Raises:
        BackendError: the named back end cannot run here; the reason is told.
    """
    if backend == "auto":
        order = AUTOMATIC.get(device_type, ("reference",))
        return next(name for name in order if why_not(name, device_type) is None)
    reason = why_not(backend, device_type)
    if reason is not None:
        raise BackendError(f"back end {backend!r} cannot run here: {reason}")
    return backend
