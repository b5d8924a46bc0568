"""What was asked of a run, the seed apart: runs that agree in it are one row with several seeds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lbs.config import FinetuneRun, RunConfig, SearchRun
from lbs.reporting.records import Record

# Names, files and logging: they do not change what a run does, or are looked at below.
_APART = {"hash", "seed", "row", "data", "weights", "weights_digest", "teacher_weights", "plan", "mean", "std"}
_APART |= {"max_unreadable", "log_every", "eval_every", "checkpoint_seconds", "full_epochs", "float_epochs", "float_lr"}


def variant(record: Record) -> str:
    """`joint`, `greedy`, `uniform-4-4`: how the bits came about; "" where the run does not say."""
    search, finetune = record.config.get("search"), record.config.get("finetune", {})
    uniform = finetune.get("uniform")
    pruned = f"-pruned-{finetune['uniform_pruned']:g}" if finetune.get("uniform_pruned") else ""
    even = f"uniform-{'-'.join(map(str, uniform))}{pruned}" if uniform else ""
    return even or (str(search.get("mode", "")) if search else "")


def asked_of(record: Record) -> str:
    """A digest of network, data, variant, targets, schedule and recipe; "" where the run has no configuration.

    Options that an older release did not have count as this one's defaults.
    """
    kinds: tuple[type[RunConfig], ...] = (SearchRun, FinetuneRun)
    recipes = {kind.command: _recipe(kind, record.config[kind.command]) for kind in kinds if _has(record, kind)}
    if not recipes:
        return ""
    card = record.network
    names = {Path(str(record.config[command].get("data", ""))).name for command in recipes}
    data = card.get("fingerprint") or sorted(names)
    body = [recipes, _float_network(record), data, card.get("num_classes"), card.get("mean"), card.get("std")]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _has(record: Record, kind: type[RunConfig]) -> bool:
    return isinstance(record.config.get(kind.command), dict)


def _recipe(kind: type[RunConfig], section: dict[str, Any]) -> dict[str, Any]:
    whole = {**{field.name: field.default for field in fields(kind)}, **section}
    length = whole["full_epochs"] or whole["epochs"]
    shares = [milestone / length for milestone in whole["milestones"]] if whole["schedule"] == "step" else []
    return {**{key: value for key, value in whole.items() if key not in _APART}, "milestones": shares}


def _float_network(record: Record) -> list[Any]:
    """Which float weights a run began with: those of a file, or how they were trained."""
    own, search = record.config.get("float", {}), record.config.get("search", {})
    sections = (own, search, record.config.get("finetune", {}))
    digest = next((section["weights_digest"] for section in sections if section.get("weights_digest")), "")
    if digest:
        return [digest]
    return [own.get("epochs", search.get("float_epochs")), own.get("lr", search.get("float_lr"))]
