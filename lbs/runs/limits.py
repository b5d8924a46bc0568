"""The targets of a run: from its configuration to a Budget, and from what was reached to results.json."""

from __future__ import annotations

from typing import Any

from lbs.config import SearchRun
from lbs.cost import Tuned
from lbs.search.outcome import BudgetResult
from lbs.search.quantities import Table
from lbs_kernels.errors import PlanError
from lbs_kernels.gpu.modelled import Modelled, modelled
from lbs_kernels.times.table import kind

TARGETS = ("bops", "size_mb", "latency_ms")
MEASURED = ("cpu", "cuda")  # kinds of devices that lbs tune measures
NO_TARGET = "no budget; name one or several: bops=0.03 (share), bops=650e6, size_mb=0.2, latency_ms=1.5"


def limits(config: SearchRun) -> dict[str, Any]:
    """Arguments of `Budget` that name the targets.

    Raises:
        PlanError: the run has no target, or names whose times count and no number of them.
    """
    asked = {name: value for name in TARGETS if (value := getattr(config, name))}
    if not asked:
        raise PlanError(NO_TARGET)
    if "latency_ms" not in asked:
        if config.latency_device != SearchRun.latency_device:
            raise PlanError(
                f"latency_device={config.latency_device} says whose times a budget of milliseconds counts, and there "
                "is none; give latency_ms=X too, or leave it out"
            )
        return asked
    return {**asked, "table": latency_table(config.model, config.latency_device, config.streams)}


def latency_table(model: str, device: str, streams: int) -> Table:
    """Seconds of layers on `device`: as `lbs tune` measured them on this machine, or of a modelled GPU.

    Raises:
        PlanError: a device of another kind. FormatError: a modelled GPU that does not exist.
    """
    model_of_gpu = modelled(device)
    if model_of_gpu is None and kind(device) not in MEASURED:
        known = ", ".join((*MEASURED, str(Modelled())))
        raise PlanError(f"latency_device={device!r} has no times; name {known}, the last also with a batch: :128")
    return model_of_gpu or Tuned(device, model=model, streams=streams)


def targets_section(outcome: BudgetResult) -> dict[str, Any]:
    """Every target, what was reached, and by the thresholds alone, in base units (bit operations, bytes, seconds).

    modelled: beside seconds that a model told.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in outcome.reached:
        told = {"modelled": row.quantity.modelled} if row.quantity.modelled else {}
        numbers = {"target": row.target, "value": row.value, "thresholds": row.thresholds}
        rows[row.quantity.name] = {**numbers, **told}
    return {"targets": rows, "target_bops": rows.get("bops", {}).get("target")}


def targets_met(section: dict[str, Any]) -> bool:
    """Whether a section of results.json holds every target it names."""
    return all(row["value"] <= row["target"] for row in section.get("targets", {}).values())
