"""The compiled modules, or why they are not there.

`cpu` and `cuda` are the modules `lbs_kernels._cpu` and `lbs_kernels._cuda`, or None; then `cpu_reason` and
`cuda_reason` say why, with the command that mends it. Importing this file never fails.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from lbs_kernels.errors import BackendError

_REPORT = Path(__file__).with_name("_build_report.json")


def build_report() -> dict[str, Any]:
    """What the build wrote: {"cpu": {built, reason, fix, compiler, details}, "cuda": {...}}, empty if never built."""
    try:
        report = json.loads(_REPORT.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"lbs_kernels._{name}"), ""
    except ImportError as error:
        part = build_report().get(name, {})
        if part.get("reason"):
            return None, f"{part['reason']}; to mend it: {part['fix']}"
        if part.get("built"):
            return None, f"it was built but does not load: {error}; build again: pip install -e ."
        return None, "it was never built; build it: pip install -e ."


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
