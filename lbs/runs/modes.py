"""What a search may change and how, by the name the configuration gives it; `lbs/runs/searches.py` does it."""

from __future__ import annotations

from typing import Any

from lbs.search.layers import FULL_BITS
from lbs_kernels.errors import PlanError

# Name -> what it sets in SearchConfig, over the user's options.
MODES: dict[str, dict[str, Any]] = {
    "joint": {},  # bits and filters at once
    "quantization-only": {"pruning": False},
    "pruning-only": {"bits": (FULL_BITS,), "pruning": True},  # the network stays in float
    "two-stage": {"pruning": True},  # filters of the float network, fine-tuning, then bits
    "multi-path": {"multi_path": True},  # a branch for every width
    "multi-path-convolutions": {"multi_path": "convolutions"},  # with weights and a convolution of its own
    "greedy": {},  # no threshold is trained: choices are fixed by the losses they were measured to add
}


def mode_settings(name: str) -> dict[str, Any]:
    """What a mode sets in SearchConfig. Raises PlanError for an unknown name."""
    if name not in MODES:
        raise PlanError(f"mode={name} is not known; use {', '.join(MODES)}")
    return MODES[name]
