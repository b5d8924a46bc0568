"""Which back end serves what: every candidate answers with None or a reason, and the choice can be explained.

Adding a back end is adding one row to `BACKENDS`. The choice comes from the measured table (`times/table.py`); where
nothing was measured, the first candidate of the default order that can serve.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

from lbs_kernels import extension
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu import kernels
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table

OPS = ("bitconv2d", "bitlinear", "quantpack", "pool")


def _reference_reason(device_type: str) -> str | None:
    return None


def _cpu_reason(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it runs on the processor, the tensors lie on {device_type}"
    return None if extension.cpu is not None else extension.cpu_reason


def _triton_reason(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it: pip install triton"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors lie on {device_type}; move them to a GPU, or set TRITON_INTERPRET=1 to test without one"


# Order = default preference. "gpu" takes the best kernel for each step, "triton" only those in Triton; the interpreter
# never is a default: on the CPU they only run where they are named.
BACKENDS: dict[str, Callable[[str], str | None]] = {
    "cpu": _cpu_reason,
    "gpu": _triton_reason,
    "triton": _triton_reason,
    "reference": _reference_reason,
}
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("gpu", "reference")}


@dataclass(frozen=True)
class Candidate:
    """One implementation's answer for one problem: a reason why not, or its measured time if there is one.

    name: a back end, or a GPU kernel with its configuration as tuning tables name it ("triton:elementwise_m32_c32_w4").
    """

    name: str
    reason: str | None
    seconds: float | None
    chosen: bool

    def __str__(self) -> str:
        mark = "->" if self.chosen else "  "
        if self.reason is not None:
            return f"{mark} {self.name}: cannot serve: {self.reason}"
        time = f"{self.seconds * 1e6:.1f} us" if self.seconds is not None else "not measured"
        return f"{mark} {self.name}: {time}"


def backend_reason(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of this device type ("cpu", "cuda"), or None where it can.

    Raises:
        BackendError: no such back end.
    """
    if backend not in BACKENDS:
        raise BackendError(f"back end {backend!r} does not exist; choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](device_type)


def available_backends(device_type: str = "cpu") -> list[str]:
    """Back ends that can run on tensors of this device type."""
    return [name for name in BACKENDS if backend_reason(name, device_type) is None]


def resolve(backend: str, device_type: str) -> str:
    """The back end for a whole program: the one named, or the first of the default order that can run.

    Raises:
        BackendError: the named back end cannot run here; the reason is told.
    """
    if backend == "auto":
        order = AUTOMATIC.get(device_type, ("reference",))
        return next(name for name in order if backend_reason(name, device_type) is None)
    reason = backend_reason(backend, device_type)
    if reason is not None:
        raise BackendError(f"back end {backend!r} cannot run here: {reason}")
    return backend


def supports(backend: str, problem: Problem) -> str | None:
    """Why `backend` cannot serve `problem`, or None where it can.

    Beyond the device, "gpu" serves what a kernel of its table serves, and "triton" what lbs_kernels/<op>/triton_impl.py
    says that it does. The native and the reference back end run every operation.
    """
    if problem.op not in OPS:
        return f"{problem.op} is not an operation; there are {', '.join(OPS)}"
    reason = backend_reason(backend, table.kind(problem.device))
    if reason is not None:
        return reason
    if backend == "gpu":
        exact = kernels.exact_families()
        answers = {family: reason for family, reason in kernels.reasons(problem).items() if family in exact}
        able = any(answer is None for answer in answers.values())
        return None if able else "; ".join(f"{family}: {answer}" for family, answer in answers.items())
    if backend != "triton":
        return None
    answer: str | None = importlib.import_module(f"lbs_kernels.{problem.op}.triton_impl").supports(problem)
    return answer


def choose(problem: Problem, backend: str = "auto") -> str:
    """The back end that runs `problem`.

    Raises:
        BackendError: the named back end cannot serve; only "auto" may fall back.
    """
    if backend != "auto":
        reason = supports(backend, problem)
        if reason is not None:
            raise BackendError(f"back end {backend!r} cannot serve {problem}: {reason}")
        return backend
    able = [name for name in _order(problem) if supports(name, problem) is None]
    measured = {name: seconds for name, seconds in _backend_times(problem).items() if name in able}
    if measured:
        return min(measured, key=lambda name: measured[name])
    if not able:
        raise BackendError(f"no back end serves {problem}: {'; '.join(str(row) for row in _rows(problem, None))}")
    return able[0]


def explain(problem: Problem) -> list[Candidate]:
    """Every implementation with its reason or its measured time, the choice of "auto" marked.

    On a GPU the kernels stand by themselves: each that was measured, fastest first, and the default.
    """
    try:
        chosen = choose(problem)
    except BackendError:
        chosen = None
    return _rows(problem, chosen)


def _order(problem: Problem) -> tuple[str, ...]:
    return AUTOMATIC.get(table.kind(problem.device), ("reference",))


def _backend_times(problem: Problem) -> dict[str, float]:
    """The fastest measured time of each back end: "cpu:t2" counts for "cpu", "triton:..." for "gpu" and "triton"."""
    found: dict[str, float] = {}
    for name, seconds in table.times(problem).items():
        family = table.family(name)
        for backend in (family, "gpu") if family in kernels.exact_families() else (family,):
            found[backend] = min(seconds, found.get(backend, seconds))
    return found


def _rows(problem: Problem, chosen: str | None) -> list[Candidate]:
    times = _backend_times(problem)
    rows = [Candidate(name, supports(name, problem), times.get(name), name == chosen) for name in BACKENDS]
    if "gpu" not in _order(problem) or backend_reason("gpu", table.kind(problem.device)) is not None:
        return rows
    others = [row for row in rows if row.name not in ("gpu", "triton")]
    return [*_kernel_rows(problem, chosen == "gpu"), *others]


def _kernel_rows(problem: Problem, chosen: bool) -> list[Candidate]:
    """GPU kernels: the measured ones, the default, and the families that cannot serve."""
    rows: dict[str, Candidate] = {}
    measured = table.times(problem)
    best = kernels.choose(problem).name if chosen else None
    for name in sorted(measured, key=lambda name: measured[name]):
        found = kernels.parse(name)
        if found is not None and not found.kernel.exact:
            continue
        if found is None:
            reason: str | None = "no kernel knows this configuration any more; measure again (lbs tune)"
        else:
            reason = kernels.refusal(found, problem)
        rows[name] = Candidate(name, reason, measured[name], name == best)
    default = kernels.default(problem)
    rows.setdefault(
        default.name, Candidate(default.name, kernels.refusal(default, problem), None, default.name == best)
    )
    for family, reason in kernels.reasons(problem).items():
        if reason is not None:
            rows[family] = Candidate(family, reason, None, False)
    return [*rows.values(), *_fallback_rows(problem, measured)]


def _fallback_rows(problem: Problem, measured: dict[str, float]) -> list[Candidate]:
    """Kernels that are not exact: never chosen here, a model allows them."""
    reason = 'not exact; it serves where a model was loaded with fallback="{}"'
    return [
        Candidate(name, reason.format(family), measured[name], False)
        for name in measured
        if (family := table.family(name)) in kernels.FALLBACKS
    ]
