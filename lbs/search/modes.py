"""What a search may change, by the name the configuration gives it."""

from __future__ import annotations

from typing import Any

from lbs_kernels.errors import PlanError

# Name -> what it sets in SearchConfig, over the user's options.
MODES: dict[str, dict[str, Any]] = {
    "joint": {},  # bits and filters at once
    "quantization-only": {"pruning": False},
}


def mode_settings(name: str) -> dict[str, Any]:
    """What a mode sets in SearchConfig. Raises PlanError for an unknown name."""
    if name not in MODES:
        raise PlanError(f"--mode {name} is not known; use {', '.join(MODES)}")
    return MODES[name]
