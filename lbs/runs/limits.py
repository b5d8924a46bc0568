"""The targets of a run: from its configuration to a Budget, and from what was reached to results.json."""

from __future__ import annotations

from typing import Any

from lbs.config import SearchRun
from lbs.cost import Tuned
from lbs.search.outcome import BudgetResult
from lbs_kernels.errors import PlanError

TARGETS = ("bops", "size_mb", "latency_ms")
NO_TARGET = "no budget; name one or several: bops=0.03 (share), bops=650e6, size_mb=0.2, latency_ms=1.5"


def limits(config: SearchRun) -> dict[str, Any]:
    """Arguments of `Budget` that name the targets.

    Raises:
        PlanError: the run has no target.
    """
    asked = {name: value for name in TARGETS if (value := getattr(config, name))}
    if not asked:
        raise PlanError(NO_TARGET)
    if "latency_ms" not in asked:
        return asked
    return {**asked, "table": Tuned(config.latency_device, model=config.model, streams=config.streams)}


def targets_section(outcome: BudgetResult) -> dict[str, Any]:
    """Every target, what was reached, and by the thresholds alone, in base units (bit operations, bytes, seconds)."""
    rows = {
        row.quantity.name: {"target": row.target, "value": row.value, "thresholds": row.thresholds}
        for row in outcome.reached
    }
    return {"targets": rows, "target_bops": rows.get("bops", {}).get("target")}


def targets_met(section: dict[str, Any]) -> bool:
    """Whether a section of results.json holds every target it names."""
    return all(row["value"] <= row["target"] for row in section.get("targets", {}).values())
