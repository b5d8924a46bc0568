"""What a learned search is measured against: greedy projection by measured losses, and pruning before quantizing.

Uniform widths are `lbs.uniform`, or a chain of one width, filters pruned evenly `evenly_pruned`; separate branches are
`SearchConfig(multi_path=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbs.plan import Plan
from lbs.quant import calibrate
from lbs.search.budget import Budget, BudgetResult
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import FULL_BITS
from lbs.search.ledger import Ledger
from lbs.search.prepare import SearchConfig, prepare
from lbs.search.projection import at_levels
from lbs.search.projection import project as project_choices
from lbs.search.quantities import Table
from lbs.search.sensitivity import Loss, losses
from lbs_kernels.errors import PlanError


def project(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    bops: float | None = None,
    *,
    size_mb: float | None = None,
    latency_ms: float | None = None,
    table: Table | None = None,
    loss: Loss = F.cross_entropy,
) -> BudgetResult:
    """Fix a searchable model's choices without training: greedily, by measured loss increase per unit saved.

        error of a step = loss with this one choice a level lower - loss at its present level, all else open

    The errors are taken to add up; then the choice with the smallest error per share of the excess it saves is closed,
    until the targets hold, and what is left over is spent the same way round. Costs one pass over `batches` for every
    level of every choice, each of which begins at the choice's own layer (`lbs/search/sensitivity.py`).

    Arguments:
        model: calibrated, searchable; its gates are closed in place and held, `freeze` follows. batches: (images,
            labels), or whatever else `loss` compares outputs with. bops, size_mb, latency_ms, table: as in `Budget`.
        loss: a scalar of outputs and labels, cross-entropy by default.

    Raises:
        PlanError: no batch, or a target the gates cannot reach.
    """
    return project_budget(Budget(model, bops, size_mb=size_mb, latency_ms=latency_ms, table=table), batches, loss)


def project_budget(
    budget: Budget,
    batches: Iterable[tuple[Tensor, Any]],
    loss: Loss = F.cross_entropy,
    filters: Callable[[Ledger], None] | None = None,
) -> BudgetResult:
    """`project` towards the targets of a budget, which is frozen from then on.

    filters: gives the ledger's choices of filters their order and errors, which are not measured here then.
    """
    stored = list(batches)
    if not stored:
        raise PlanError("project got no batch; give at least one batch of images and labels")
    ledger, model = budget.ledger, budget.model
    with torch.no_grad():
        budget.freeze()
        ledger.read(errors=True)
        at_levels(ledger, lambda choice: choice.top)
        ledger.apply()
        if filters is not None:
            filters(ledger)
        known = () if filters is None else tuple(ledger.filters)
        open_loss, below = losses(model, ledger, stored, loss, without=known)
        for choice, found in below.items():
            choice.errors = _errors_of(found, open_loss)
        project_choices(ledger, budget.targets, filters_last=False)
        ledger.apply()
        budget.freeze()  # holds the thresholds as they are now
    return budget.result()


def _errors_of(below: list[float], open_loss: float) -> tuple[float, ...]:
    """Loss added by each step down of one choice, the others open; what lowers the loss counts as free."""
    return tuple(max(0.0, lower - upper) for lower, upper in pairwise([*below, open_loss]))


def evenly_pruned(
    model: nn.Module, example: Tensor, share: float, *, group_size: int = 4, exclude: tuple[str, ...] = ()
) -> Plan:
    """The plan of a float network of which every layer that can lose filters loses the same share of its groups.

    Those whose norms have the smallest gamma go. `with_bits` makes it one of uniform bits, `freeze` applies it.

    Raises:
        PlanError: a share outside [0, 1). GraphError: as `prepare`.
    """
    config = SearchConfig((FULL_BITS,), group_size=group_size, max_pruning_ratio=share, exclude=exclude)
    searched = prepare(model, example, config)
    plan_of(searched)  # ranks the filters
    ledger = Ledger(searched)
    ledger.read(errors=True)
    at_levels(ledger, lambda choice: 0)
    ledger.apply()
    return plan_of(searched)


def two_stage(
    model: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    search: Callable[[nn.Module, Budget], object],
    finetune: Callable[[nn.Module], object],
    *,
    prune_bops: float,
    bops: float,
    config: SearchConfig | None = None,
) -> nn.Module:
    """The two-stage baseline: prune a float network, fine-tune it, then search the bits of what is left; frozen.

    Arguments:
        model, example, config: as in `lbs.prepare`.
        batches: images for calibration. search: trains a searchable model with its budget. finetune: trains the pruned
            float network. prune_bops: target of the first stage, 32 x 32 bits counted. bops: target of the second, a
            number of bit operations or a fraction of the PRUNED network's full precision.

    Raises:
        PlanError: a target that cannot be reached.
    """
    config = config or SearchConfig()
    pruning = prepare(model, example, replace(config, bits=(FULL_BITS,), pruning=True))
    pruned = _searched(pruning, Budget(pruning, prune_bops), search)
    finetune(pruned)
    quantizing = calibrate(prepare(pruned, example, replace(config, pruning=False)), batches, norms="estimate")
    return _searched(quantizing, Budget(quantizing, bops), search)


def _searched(model: nn.Module, budget: Budget, search: Callable[[nn.Module, Budget], object]) -> nn.Module:
    search(model, budget)
    budget.finish()
    return freeze(model)
