"""The searches behind the modes: a float network in, a frozen one and its plan out; each resumable at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lbs.data
from lbs.config import SearchRun
from lbs.cost import Tuned
from lbs.plan import LayerPlan, Plan
from lbs.quant import calibrate, estimate_norms
from lbs.runs import network
from lbs.runs.limits import limits
from lbs.runs.modes import mode_settings
from lbs.runs.session import (
    Session,
    calibration_batches,
    goes_on,
    test_loader,
    train_loader,
)
from lbs.search import removal
from lbs.search.baselines import project_budget
from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import FULL_BITS
from lbs.search.ledger import Ledger
from lbs.search.outcome import BudgetResult
from lbs.search.prepare import SearchConfig, conversion_report, prepare
from lbs.search.streams import FLOAT, check_streams
from lbs.traced import evaluating
from lbs.train.following import distance
from lbs.train.trainer import Trainer
from lbs_kernels.errors import PlanError, TrainingError


@dataclass(frozen=True)
class Found:
    """What a search ends with. `plan` is that of the float network the search began with.

    training: of the last phase that was trained; `seconds` are those of all, told apart in `phases` where several were.
    """

    network: nn.Module
    plan: Plan
    outcome: BudgetResult
    training: dict[str, Any]
    report: list[tuple[str, str]]


@dataclass(frozen=True)
class SearchJob:
    """A configuration and what it is applied to, with the steps that all searches are made of."""

    config: SearchRun
    session: Session
    data: lbs.data.ImageSet
    example: Tensor

    def prepared(self, model: nn.Module, settings: SearchConfig) -> nn.Module:
        """A searchable, calibrated copy; says what became of every layer."""
        streams = FLOAT if settings.bits == (FULL_BITS,) else self.config.streams
        searched = prepare(model, self.example.to(self.session.device), settings, streams)
        for name, fate in conversion_report(searched):
            self.session.say(f"{name}: {fate}")
        return calibrate(searched, self.images(), bits=4, norms="estimate")

    def images(self) -> list[Tensor]:
        """Images that set the ranges."""
        return calibration_batches(self.config, self.data, self.session.device)

    def budget(self, searched: nn.Module, **targets: Any) -> Budget:
        """The controller of a searchable model."""
        return Budget(searched, strength=self.config.strength, gain=self.config.gain, **targets)

    def search(self, searched: nn.Module, budget: Budget, phase: str, teacher: nn.Module) -> dict[str, Any]:
        """Train thresholds and weights until the budget is met."""
        config = self.config
        groups = parameter_groups(searched, config.lr, config.weight_decay, config.gate_lr, config.prune_lr)
        options: dict[str, Any] = {"groups": groups, "budget": budget, "teacher": teacher}
        options["observe"] = lambda: _gate_row(searched, budget)
        options["stop"] = (lambda: budget.frozen) if config.stop_when_met else None
        return self.train(searched, config, phase, **options)

    def train(self, model: nn.Module, config: SearchRun, phase: str, **options: Any) -> dict[str, Any]:
        """One phase, from where its checkpoint is."""
        session = self.session
        trainer = Trainer(
            model,
            train_loader(config, self.data, session.device),
            config,
            phase=phase,
            test=test_loader(self.data, session.device),
            folder=session.folder,
            progress=session.progress,
            **options,
        )
        return {**trainer.fit(goes_on(session, phase)).as_dict(), **left_out(trainer.train, self.data)}

    def frozen(self, searched: nn.Module) -> nn.Module:
        """The network that is left, with ranges at its own widths and norms estimated again."""
        found = freeze(searched)
        if plan_of(found).in_float:
            estimate_norms(found, self.images())
            return found
        return calibrate(found, self.images(), norms="estimate")

    def found(self, searched: nn.Module, outcome: BudgetResult, training: dict[str, Any]) -> Found:
        """The end of a search."""
        self.session.say(str(outcome))
        network = self.frozen(searched)
        return Found(network, plan_of(network), outcome, training, conversion_report(searched))


Search = Callable[[SearchJob, nn.Module], Found]


def by_gates(job: SearchJob, model: nn.Module) -> Found:
    """Thresholds learn until the budget is met: all modes but two."""
    searched = job.prepared(model, search_settings(job.config))
    budget = job.budget(searched, **limits(job.config))
    training = job.search(searched, budget, "search", teacher=model)
    return job.found(searched, budget.finish(), training)


def greedy(job: SearchJob, model: nn.Module) -> Found:
    """Choices are fixed by measured losses before any step; then as a search goes on once its budget is met."""
    settings = by_filters(search_settings(job.config))
    searched = job.prepared(model, settings)
    budget = job.budget(searched, **limits(job.config))
    if not goes_on(job.session, "search"):
        close_by_losses(budget, model, settings, job.images())
    training = job.search(searched, budget, "search", teacher=model)
    return job.found(searched, budget.result(), training)


def by_filters(settings: SearchConfig) -> SearchConfig:
    """The same, filters ranked one by one where some may go, as many together as before."""
    tile = math.lcm(settings.group_size, settings.filter_tile)
    return replace(settings, group_size=1, filter_tile=tile) if settings.pruning else settings


def close_by_losses(budget: Budget, model: nn.Module, settings: SearchConfig, batches: list[Tensor]) -> None:
    """Fix widths and filters by how far the outputs move; readers are fitted to the filters that stay.

    Arguments:
        budget: of a searchable, calibrated copy of `model`, prepared by `settings`. batches: images.
    """
    with evaluating(model), torch.no_grad():
        pairs = [(images, model(images)) for images in batches]
    plain, groups = removal.plain(model, batches[0][:2], settings)
    measured = partial(_measure, plain, groups, batches)
    project_budget(budget, pairs, distance, measured if budget.ledger.filters else None)
    kept = {layer.name: layer.kept for layer in plan_of(budget.model).layers if layer.kept is not None}
    if kept:
        fitted = removal.compensated(plain, groups, kept, batches)
        removal.make_up(budget.model, fitted, groups, kept)
        estimate_norms(budget.model, batches)


def _measure(plain: nn.Module, groups: Any, batches: list[Tensor], ledger: Ledger) -> None:
    removal.measure(plain, groups, ledger, batches, sum(map(len, batches)), distance)


def two_stage(job: SearchJob, model: nn.Module) -> Found:
    """Filters of the float network (phase `prune`), fine-tuning in float (`pruned`), then bits (`search`)."""
    config, settings = job.config, search_settings(job.config)
    pruning = job.prepared(model, replace(settings, bits=(FULL_BITS,)))
    budget = job.budget(pruning, bops=config.prune_bops)
    phases = {"prune": job.search(pruning, budget, "prune", teacher=model)}
    job.session.say(f"filters: {budget.finish()}")
    pruned = job.frozen(pruning)
    rest = between_stages(config)
    groups = parameter_groups(pruned, rest.lr, rest.weight_decay)
    phases["pruned"] = job.train(pruned, rest, "pruned", groups=groups, teacher=model)
    quantizing = job.prepared(pruned, replace(settings, pruning=False))
    targets = limits(config)
    if config.bops and config.bops <= 1:  # a share of the whole network, as in every other mode
        targets["bops"] = config.bops * budget.full_precision
    if isinstance(targets.get("table"), Tuned):  # calls were measured of the whole network
        targets["table"] = replace(targets["table"], whole=tuple(budget.plan.whole_problems()))
    second = job.budget(quantizing, **targets)
    phases["search"] = job.search(quantizing, second, "search", teacher=model)
    seconds = sum(phase["seconds"] for phase in phases.values())
    training = {**phases["search"], "seconds": seconds, "phases": phases}
    found = job.found(quantizing, second.finish(), training)
    return replace(found, plan=with_bits(plan_of(pruned), found.plan))


def between_stages(config: SearchRun) -> SearchRun:
    """The recipe of fine-tuning in float between the two stages. Raises TrainingError for numbers that make none."""
    epochs = config.pruned_epochs or config.epochs
    try:
        return replace(config, epochs=epochs, lr=config.pruned_lr, schedule="cosine", milestones=())
    except TrainingError as error:
        raise TrainingError(f"between the stages: pruned_{error}") from error  # of epochs or lr: the rest is as it was


def with_bits(pruned: Plan, quantized: Plan) -> Plan:
    """Kept filters of one plan; bits, what weights are rounded to and the mark of the plan of the network it left."""

    def joined(entry: LayerPlan, rounded: LayerPlan) -> LayerPlan:
        bits = replace(entry, w_bits=rounded.w_bits, a_bits=rounded.a_bits)
        return replace(bits, w_grid=rounded.w_grid, ranges=rounded.ranges)

    layers = tuple(joined(entry, quantized.layer(entry.name)) for entry in pruned.layers)
    return replace(pruned, layers=layers, modelled=quantized.modelled)


_SEARCHES: dict[str, Search] = {"two-stage": two_stage, "greedy": greedy}


def search_of(mode: str) -> Search:
    """The search behind a mode."""
    return _SEARCHES.get(mode, by_gates)


def search_settings(config: SearchRun) -> SearchConfig:
    """What is searched: the options the two configurations share, changed by the mode.

    Raises PlanError for an option that contradicts the mode.
    """
    own = {field.name for field in fields(config)}
    options = {field.name: getattr(config, field.name) for field in fields(SearchConfig) if field.name in own}
    options["group_size"] = config.group_size or network.prune_group(config.model)
    for name, value in mode_settings(config.mode).items():
        asked = options.get(name, value)
        if asked not in (value, getattr(SearchConfig, name)):
            raise PlanError(f"mode={config.mode} takes {name}={value!r}, asked is {asked!r}; leave one of them out")
    return SearchConfig(**{**options, **mode_settings(config.mode)})


def check_reach(config: SearchRun, model: nn.Module, example: Tensor) -> None:
    """Refuse targets that no choice of the gates meets; neither weights nor gates need any training for that.

    model: the float network, untrained. What `two-stage` reaches with bits depends on the filters it has cut by then;
    here it may cut all that are allowed to go.

    Raises:
        PlanError: a target out of reach, or a layer that the latency table does not know.
    """
    settings = search_settings(config)
    check_streams(config.streams)
    if config.streams != FLOAT and settings.bits == (FULL_BITS,):
        raise PlanError(f"mode={config.mode} searches no bits, so there are no streams={config.streams}; leave it out")
    if config.mode == "two-stage":
        between_stages(config)
        Budget(prepare(model, example, replace(settings, bits=(FULL_BITS,))), config.prune_bops)
    budget = Budget(prepare(model, example, settings), **limits(config))
    for quantity in (target.quantity for target in budget.targets):
        for choice in budget.ledger.choices:
            for level in range(len(choice.amounts)):
                budget.ledger.change(quantity, choice, level)  # a price that is not known raises


def left_out(loader: lbs.data.Loader, data: lbs.data.ImageSet) -> dict[str, Any]:
    """Images that could not be read, where there were any: file -> reason."""
    unreadable = {**getattr(data, "unreadable", {}), **getattr(loader, "unreadable", {})}
    return {"unreadable": unreadable} if unreadable else {}


def _gate_row(model: nn.Module, budget: Budget) -> dict[str, Any]:
    """What a metrics row of the search shows besides the loss."""
    plan = plan_of(model)
    gates = {layer.name: [layer.w_bits, layer.a_bits, layer.kept_filters] for layer in plan.layers}
    return {"bops": plan.bops(), "lambda": budget.strength, "frozen": budget.frozen, "gates": gates}
