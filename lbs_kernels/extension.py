"""The compiled modules, or why they are not there.

`cpu` and `cuda` are the modules `lbs_kernels._cpu` and `lbs_kernels._cuda`, or None; then `cpu_reason` and
`cuda_reason` say why, with the command that mends it. Importing this file never fails.
"""

from __future__ import annotations

import importlib
import json
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from lbs_kernels.errors import BackendError

_REPORT = Path(__file__).with_name("_build_report.json")
C_LIBRARY = Path(__file__).with_name("liblbs.so")  # where it is built; lbs.h lies beside it
# What Python uses of each module. One that lacks any of it is another release's, and so is taken for missing.
NEEDED: dict[str, tuple[str, ...]] = {
    "cpu": (
        "Network.run",
        "Program.run",
        "Program.run_traced",
        "Program.step_times",
        "cpu_features",
        "fake_quant_backward",
        "fake_quant_forward",
        "isa_reasons",
        "resolve_isa",
    ),
    "cuda": ("onebit_launch", "s8_launch"),
}


def build_report() -> dict[str, Any]:
    """What the build wrote: {"cpu": {built, reason, fix, compiler, details}, "cuda": {...}}, empty if never built."""
    try:
        report = json.loads(_REPORT.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(f"lbs_kernels._{name}")
    except ImportError as error:
        part = build_report().get(name, {})
        if part.get("reason"):
            return None, f"{part['reason']}; to mend it: {part['fix']}"
        if part.get("built"):
            return None, f"it was built but does not load: {error}; build again: pip install -e ."
        return None, "it was never built; build it: pip install -e ."
    lacks = [needed for needed in NEEDED.get(name, ()) if not _has(module, needed)]
    if lacks:
        words = f"the one found was built by another release and lacks {', '.join(lacks)}"
        return None, f"{words}; build it again: pip install -e ."
    return module, ""


def _has(module: ModuleType, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


cpu, cpu_reason = _load("cpu")
cuda, cuda_reason = _load("cuda")


def require_cpu() -> ModuleType:
    """`lbs_kernels._cpu`. Raises BackendError, with the reason and the way out, where it is missing."""
    if cpu is None:
        raise BackendError(f"the native CPU module is missing: {cpu_reason}")
    return cpu


def require_cuda() -> ModuleType:
    """`lbs_kernels._cuda`. Raises BackendError, with the reason and the way out, where it is missing."""
    if cuda is None:
        raise BackendError(f"the native CUDA module is missing: {cuda_reason}")
    return cuda
