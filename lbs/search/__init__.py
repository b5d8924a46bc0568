"""The search: gates, bit sharing, budget, freezing."""

from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.prepare import SearchConfig, conversion_report, prepare, uniform

__all__ = ["Budget", "SearchConfig", "conversion_report", "freeze", "parameter_groups", "plan_of", "prepare", "uniform"]
