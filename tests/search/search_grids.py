"""A searched network frozen on the grids it was searched with, so that both compute the same."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lbs.plan import Plan
from lbs.quant.layers import QuantLayer
from lbs.search.freeze import plan_of


def as_searched(model: nn.Module) -> Plan:
    """The plan on the grids of the search, which has the odd one at every width that is still chosen from."""
    plan = plan_of(model)
    searched = {name for name, module in model.named_modules() if isinstance(module, QuantLayer) and module.searched}
    grids = (replace(entry, w_grid="odd") if entry.name in searched else entry for entry in plan.layers)
    return replace(plan, layers=tuple(grids))
