"""The search: gates, bit sharing, budget, freezing, and what it is measured against."""

from lbs.search.baselines import project, two_stage
from lbs.search.budget import Budget, BudgetResult, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.prepare import SearchConfig, conversion_report, prepare, uniform

__all__ = [
    "Budget",
    "BudgetResult",
    "SearchConfig",
    "conversion_report",
    "freeze",
    "parameter_groups",
    "plan_of",
    "prepare",
    "project",
    "two_stage",
    "uniform",
]
